"""Memory of whole training steps at full size in float16 autocast, where nnU-Net trains, to default nnU-Net."""

from __future__ import annotations

import pytest

from nnunet_ext.memory.count import TrainingMemory, training_memory
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.nnunet.source import Source


def counted(trainer: str) -> TrainingMemory:
    """128x128x128, batch 2, one channel, three classes, features 32 to 320."""
    return training_memory(Source(patch=(128, 128, 128)).setting(), trainer)


@pytest.fixture(scope="module")
def default() -> TrainingMemory:
    return counted("nnUNetTrainer")


def test_default_needs_what_is_known(default: TrainingMemory) -> None:
    assert default.held / GIB == pytest.approx(3.64, rel=0.01)
    assert default.peak / GIB == pytest.approx(4.68, rel=0.01)


@pytest.mark.parametrize(
    ("trainer", "held", "peak"),
    [
        ("nnUNetTrainerReversible", 0.21, 0.33),
        pytest.param("nnUNetTrainerInvertible", 0.19, 0.29, marks=pytest.mark.slow),
        pytest.param("nnUNetTrainerInvertibleNoVAE", 0.19, 0.29, marks=pytest.mark.slow),
        pytest.param("nnUNetTrainerPartiallyInvertible", 0.32, 0.51, marks=pytest.mark.slow),
    ],
)
def test_recomputing_networks_need_a_fraction(trainer: str, held: float, peak: float, default: TrainingMemory) -> None:
    memory = counted(trainer)
    assert memory.held <= held * default.held
    assert memory.peak <= peak * default.peak
