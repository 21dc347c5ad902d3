"""Counted figures of activation checkpointing, float16 autocast, batch 2, three classes: claims of its method page."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

from nnunet_ext.memory.count import TrainingMemory, count_memory
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.source import Source
from nnunet_ext.trainers.nnUNetTrainerActivationCheckpointing import nnUNetTrainerActivationCheckpointing

TRAINER = "nnUNetTrainerActivationCheckpointing"


def isotropic(edge: int | tuple[int, ...], is_residual: bool = False, **changes: Any) -> Setting:
    """nnU-Net's default network for a patch, cubic where it has one edge, or that of its ResEnc plans."""
    setting = Source(patch=edge if isinstance(edge, tuple) else (edge,) * 3).setting()
    plans = deepcopy(dict(setting.plans))
    configuration = plans["configurations"]["3d_fullres"]
    if is_residual:
        architecture = configuration["architecture"]
        architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        arguments = architecture["arch_kwargs"]
        n = len(arguments.pop("n_conv_per_stage"))
        arguments |= {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6, 6][:n], "n_conv_per_stage_decoder": [1] * (n - 1)}
    configuration |= changes
    return replace(setting, plans=plans)


def to_default(setting: Setting) -> tuple[float, float]:
    """Held and peak to those of the default trainer."""
    ours, default = (count_memory(setting, trainer, 2) for trainer in (TRAINER, "nnUNetTrainer"))
    return ours.held / default.held, ours.peak / default.peak


def test_default_network_peaks_at_a_third() -> None:
    held, peak = to_default(isotropic(128))
    assert held <= 0.19
    assert peak <= 0.32


@pytest.mark.slow
def test_resenc_network_peaks_at_a_third() -> None:
    held, peak = to_default(isotropic(128, is_residual=True))
    assert held <= 0.17
    assert peak <= 0.34


@pytest.mark.slow
@pytest.mark.parametrize(("patch", "gpu"), [((192, 192, 192), 11), ((256, 224, 224), 16)])
def test_resenc_plans_for_24_and_40_gb_are_expected_to_fit_11_and_16(patch: tuple[int, ...], gpu: int) -> None:
    # What nnU-Net's L and XL presets plan for an isotropic CT.
    assert count_memory(isotropic(patch, is_residual=True), TRAINER, 2).expected <= gpu * GIB


@pytest.mark.slow
def test_norms_alone_halve_the_default_network(monkeypatch: pytest.MonkeyPatch) -> None:
    class nnUNetTrainerCheckpointedNorms(nnUNetTrainerActivationCheckpointing):
        recompute = "norms"

    monkeypatch.setattr("nnunet_ext.memory.step.trainer_class", lambda name: nnUNetTrainerCheckpointedNorms)
    monkeypatch.setattr("nnunet_ext.nnunet.setting.trainer_class", lambda name: nnUNetTrainerCheckpointedNorms)
    norms = count_memory(isotropic(128), "nnUNetTrainerCheckpointedNorms", 2)
    monkeypatch.undo()
    default = count_memory(isotropic(128), "nnUNetTrainer", 2)
    assert norms.held <= 0.49 * default.held
    assert norms.peak <= 0.47 * default.peak


def expanded(standard: int, edge: int) -> TrainingMemory:
    setting = isotropic(standard, patch_size=[edge] * 3, me_unet={"k": edge / standard})
    return count_memory(setting, "nnUNetTrainerMeCheckpointing", 2)


def test_meunet_sees_192_voxels_with_the_patch_of_128() -> None:
    assert expanded(128, 192).peak <= 1.7 * GIB


def test_one_pass_sees_192_voxels_at_a_third_of_the_memory_of_the_default_trainer() -> None:
    large = isotropic(128, patch_size=[192] * 3)
    default, one_pass, stages = (
        count_memory(large, trainer, 2).peak for trainer in ("nnUNetTrainer", "nnUNetTrainerMeUNetOnePass", TRAINER)
    )
    assert one_pass <= 0.35 * default
    assert stages <= 0.29 * default


def test_one_pass_of_the_cascade_needs_less_than_one_and_a_half_times_its_two_passes() -> None:
    setting = Source(patch=(224,) * 3).setting()
    trainers = ("nnUNetTrainer", "nnUNetTrainerMeCascade", "nnUNetTrainerMeCascadeOnePass")
    default, two, one = (count_memory(setting, trainer, 2).peak for trainer in trainers)
    assert 1.2 * two <= one <= 1.42 * two
    assert one <= 0.36 * default


@pytest.mark.slow
def test_meunet_sees_224_voxels_with_the_patch_of_160() -> None:
    assert expanded(160, 224).peak <= 2.9 * GIB


@pytest.mark.slow
def test_meunet_sees_320_voxels_with_the_patch_of_192_on_a_card_of_11_gb() -> None:
    memory = expanded(192, 320)
    assert memory.peak <= 6.2 * GIB
    assert memory.expected <= 11 * GIB
