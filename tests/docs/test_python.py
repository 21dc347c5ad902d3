"""The examples of docs/how-to/python.md run as they are printed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from nnunet_ext.api import create
from nnunet_ext.errors import UsageError
from tests.comparison.conftest import MakeRun, make_run, random_folds
from tests.contract.conftest import dataset
from tests.contract.test_deploy import trained

__all__ = ["dataset", "make_run"]  # fixtures
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "python.md"


def run(which: str) -> dict[str, Any]:
    """Run the example that imports this function; return its names."""
    examples = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (example,) = [example for example in examples if f"api import {which}\n" in example]
    names: dict[str, Any] = {}
    exec(compile(example, str(PAGE), "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_network_is_created_for_a_patch() -> None:
    names = run("create")
    assert names["logits"].shape == (1, 3, 32, 64, 64)
    _, strides, *_ = get_pool_and_conv_props([1.0] * 3, (32, 64, 64), 4, 999999)
    assert [stage.stride for stage in names["network"].stages] == [list(stride) for stride in strides]


def test_memory_is_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    memory = run("estimate")["expected"].memory
    assert 0 < memory.peak < memory.expected
    assert capsys.readouterr().out.startswith(f"{memory.peak} {memory.expected} ")


def test_trainings_are_compared(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("nnUNetTrainer", random_folds(0))
    make_run("nnUNetTrainerReversible", random_folds(0, shift=0.1))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (evaluation,) = run("compare")["found"].evaluations
    default, ours = (evaluation.mean(label).mean for label in evaluation.labels)
    assert ours == pytest.approx(default + 0.1, abs=1e-3)
    assert (tmp_path / "report" / "report.html").is_file()


def test_a_model_is_deployed(dataset: Callable[[str], int], tmp_path: Path) -> None:
    trained("nnUNetTrainerFasterFusionBN", dataset("labels"), tmp_path / "model")
    shipped = run("deploy")["shipped"]["0"]
    assert shipped.parameters < shipped.parameters_before
    assert (tmp_path / "shipped" / "plans.json").is_file()


def test_networks_of_nnunet_can_be_created_too() -> None:
    network = create("PlainConvUNet", 2, 1, (32, 32), n_conv_per_stage=1, n_conv_per_stage_decoder=1)
    assert type(network).__name__ == "PlainConvUNet"
    assert network.encoder.stages[0][0].convs[0].conv.in_channels == 2


def test_an_unknown_network_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"one of PlainConvUNet, .*ReversibleUNet, got Nothing: choose"):
        create("Nothing", 1, 2, (32, 32))
