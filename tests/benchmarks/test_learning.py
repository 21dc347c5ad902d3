"""The benchmark that trains every method: each training once, whatever ends it."""

from __future__ import annotations

import importlib
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import learning
from benchmarks.learning import Training, registered, run_all
from nnunet_ext import registry
from nnunet_ext.protocols import only_predicts
from nnunet_ext.trainers.distillation import DistillationMixin
from nnunet_ext.trainers.nnUNetTrainerMeCascade import nnUNetTrainerMeCascade
from tests.benchmarks.stand_ins import leaves, sleeps

DATASET = "Dataset801_Fake"


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Training]:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    for name in ("nnUNet_n_proc_DA", "nnUNet_def_n_proc"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    common = {"dataset": DATASET, "configuration": "3d_fullres", "fold": "0", "device": "cpu", "precision": "float32"}
    return [Training(trainer=f"nnUNetTrainer{name}", plans="nnUNetPlans", **common) for name in ("A", "Fails", "B")]


def calls(folder: Path) -> dict[str, list[str]]:
    return {path.name.split("__")[1][13:]: path.read_text().splitlines() for path in (folder / "logs").glob("*.txt")}


def test_the_same_call_trains_what_is_missing_and_nothing_else(
    trainings: list[Training], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_all(trainings[:1], 1, work=leaves) == []
    assert run_all(trainings, 2, work=leaves) == [trainings[1]]
    assert calls(tmp_path) == {"A": ["1 False"], "Fails": ["1 False"], "B": ["1 False"]}
    assert "nnUNetTrainerFails__nnUNetPlans__3d_fullres__0: failed (3)" in capsys.readouterr().out
    (tmp_path / "logs" / "mended").touch()
    run_all(trainings, 2, work=leaves)
    assert calls(tmp_path) == {"A": ["1 False"], "Fails": ["1 False", "1 True"], "B": ["1 False"]}
    assert all(training.is_done for training in trainings)


def test_where_the_time_is_over_nothing_new_begins(trainings: list[Training], tmp_path: Path) -> None:
    run_all(trainings, 1, seconds=0, work=leaves)
    assert calls(tmp_path) == {}


def test_every_registered_trainer_that_trains_by_itself_is_trained() -> None:
    def needs_more(name: str) -> bool:
        trainer = registry.resolve("trainers", name)
        return only_predicts(trainer) or issubclass(trainer, (DistillationMixin, nnUNetTrainerMeCascade))

    ours = [entry.name for entry in registry.entries("trainers") if entry.value.startswith("nnunet_ext.")]
    assert sorted(registered()) == sorted(["nnUNetTrainer", *(name for name in ours if not needs_more(name))])
    assert registered()[0] == "nnUNetTrainer"


def test_a_fold_goes_on_only_as_it_began(trainings: list[Training]) -> None:
    trainings[0].note()
    trainings[0].note()
    with pytest.raises(SystemExit, match=r"float32.*bfloat16.*another nnUNet_results"):
        replace(trainings[0], precision="bfloat16").note()


def test_what_is_left_running_is_ended(
    trainings: list[Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clock() -> float:
        """Time is over as soon as the process has said its number."""
        return 0.0 if not any(log.read_text() for log in (tmp_path / "logs").glob("*.txt")) else 1.0

    monkeypatch.setattr(learning, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    run_all(trainings[:1], 1, seconds=0.5, work=sleeps)
    (log,) = (tmp_path / "logs").glob("*.txt")
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


@pytest.mark.parametrize(("precision", "dtype"), [("float32", None), ("bfloat16", torch.bfloat16)])
def test_precision_is_that_of_nnunets_training_and_prediction(precision: str, dtype: torch.dtype | None) -> None:
    with learning.autocast(precision):
        for place in learning.PLACES:
            with importlib.import_module(place).dummy_context():
                product = torch.nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1))
            assert product.dtype == (dtype or torch.float32)


def test_batch_size_changes_in_all_configurations_of_a_copy(planned_dataset: Path) -> None:
    name = learning.with_batch_size(planned_dataset, "nnUNetPlans", 5)
    copied, plans = (learning.json.loads((planned_dataset / f"{n}.json").read_text()) for n in (name, "nnUNetPlans"))
    assert copied["plans_name"] == name == "nnUNetPlans_batch5"
    sizes = {key: value.get("batch_size") for key, value in copied["configurations"].items()}
    assert sizes == {"2d": 5, "3d_fullres": 5, "3d_half": 5}
    assert plans["configurations"]["3d_fullres"]["batch_size"] != 5
