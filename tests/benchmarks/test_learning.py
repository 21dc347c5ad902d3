"""The benchmark that trains every method: each training once, whatever ends it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import learning
from benchmarks.learning import Training, registered, run_all
from nnunet_ext import registry

DATASET = "Dataset801_Fake"


def leaves(training: Training, log: Path) -> None:
    """In the place of nnU-Net: note the call and the threads, validate; "Fails" stops before, as a kill does."""
    with log.open("a") as file:
        file.write(f"{os.environ['OMP_NUM_THREADS']} {training.has_begun}\n")
    training.folder.mkdir(parents=True, exist_ok=True)
    (training.folder / "checkpoint_best.pth").touch()
    if "Fails" in training.trainer and not (log.parent / "mended").exists():
        os._exit(3)
    (training.folder / "validation").mkdir()
    (training.folder / "validation" / "summary.json").touch()


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Training]:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    for name in ("nnUNet_n_proc_DA", "nnUNet_def_n_proc"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    common = {"dataset": DATASET, "configuration": "3d_fullres", "fold": "0", "device": "cpu", "precision": "float32"}
    return [Training(trainer=f"nnUNetTrainer{name}", plans="nnUNetPlans", **common) for name in ("A", "Fails", "B")]


def calls(folder: Path) -> dict[str, list[str]]:
    return {path.name.split("__")[0][13:]: path.read_text().splitlines() for path in (folder / "logs").glob("*.txt")}


def test_the_same_call_trains_what_is_missing_and_nothing_else(
    trainings: list[Training], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_all(trainings[:1], 1, work=leaves)
    run_all(trainings, 2, work=leaves)
    assert calls(tmp_path) == {"A": ["1 False"], "Fails": ["1 False"], "B": ["1 False"]}
    assert "nnUNetTrainerFails 0: failed (3)" in capsys.readouterr().out
    (tmp_path / "logs" / "mended").touch()
    run_all(trainings, 2, work=leaves)
    assert calls(tmp_path) == {"A": ["1 False"], "Fails": ["1 False", "1 True"], "B": ["1 False"]}
    assert all(training.is_done for training in trainings)


def test_where_the_time_is_over_nothing_new_begins(trainings: list[Training], tmp_path: Path) -> None:
    run_all(trainings, 1, seconds=0, work=leaves)
    assert calls(tmp_path) == {}


def test_every_registered_trainer_that_trains_by_itself_is_trained() -> None:
    left_out = set(registry.names("trainers")) - set(registered())
    assert registered()[0] == "nnUNetTrainer"
    assert len(registered()) == len(set(registered()))
    assert [name for name in left_out if not any(part in name for part in learning.CANNOT_TRAIN_ALONE)] == []


def test_batch_size_changes_in_all_configurations_of_a_copy(planned_dataset: Path) -> None:
    name = learning.with_batch_size(planned_dataset, "nnUNetPlans", 5)
    copied, plans = (learning.json.loads((planned_dataset / f"{n}.json").read_text()) for n in (name, "nnUNetPlans"))
    assert copied["plans_name"] == name == "nnUNetPlans_batch5"
    sizes = {key: value.get("batch_size") for key, value in copied["configurations"].items()}
    assert sizes == {"2d": 5, "3d_fullres": 5, "3d_half": 5}
    assert plans["configurations"]["3d_fullres"]["batch_size"] != 5
