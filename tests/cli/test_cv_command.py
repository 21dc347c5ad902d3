"""`nnunet-ext cv`: its options, what it refuses, and the table that it prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_ext import cli
from nnunet_ext.cluster.request import CrossValidation, Method
from nnunet_ext.cluster.states import State, write_state
from nnunet_ext.cluster.steps import make_steps

Call = Callable[..., int]
SMALL = ("-d", "801", "--gpus", "0")


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command in a folder of its own, with a raw data set 801."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    raw = tmp_path / "raw" / "Dataset801_Fake"
    raw.mkdir()
    (raw / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}))
    monkeypatch.setattr("nnunet_ext.cluster.local.start", lambda output, groups: [*range(len(groups))])
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return lambda *words: cli.main(["cv", *words])


def test_what_is_asked_for_is_kept_and_shown(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainers = ("nnUNetTrainer", "nnUNetTrainerReversible_9epochs:nnUNetReversiblePlans")
    assert call(*SMALL, "-tr", *trainers, "-f", "1", "0", "--npz") == 0
    kept = CrossValidation.read(tmp_path / "cross_validation")
    assert kept.methods == (
        Method(trainer="nnUNetTrainer", plans="nnUNetPlans"),
        Method(trainer="nnUNetTrainerReversible_9epochs", plans="nnUNetReversiblePlans"),
    )
    assert (kept.datasets, kept.folds, kept.npz, kept.device) == (("Dataset801_Fake",), (0, 1), True, "cpu")
    shown = capsys.readouterr().out
    assert "Workers started: 1." in shown
    assert "nnUNetTrainerReversible_9epochs" in shown
    assert [line for line in shown.splitlines() if len(line) > 80 and str(tmp_path) not in line] == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "needs data sets, -d was not given"),
        (("-d", "802"), "-d must be data sets in nnUNet_raw or nnUNet_preprocessed, got 802"),
        ((*SMALL, "-tr", "nnUNetTrainerReversibel"), "Did you mean nnUNetTrainerReversible"),
        ((*SMALL, "-p", "mine"), "plans must be there, or be those of a planner, got mine"),
        ((*SMALL, "-f", "5"), "-f must be folds of the split of Dataset801_Fake, 0 1 2 3 4, got 5"),
        ((*SMALL, "--partition", "gpu"), "--partition is for Slurm"),
        ((*SMALL, "--jobs", "0"), "--jobs must be at least 1"),
        (("-d", "801", "--gpus", "-1"), "--gpus must be 0 or more"),
        (("-d", "801", "--gpus", "0", "-device", "cuda"), "-device cuda needs a GPU, --gpus is 0 or"),
        ((*SMALL, "--executor", "slurm", "--jobs", "2"), "--jobs is for this machine"),
        ((*SMALL, "--executor", "slurm", "--time", "soon"), "--time must be a time"),
        ((*SMALL, "--executor", "slurm", "--slurm", "account="), "--slurm must be options of sbatch"),
        (("status",), "-o must be the folder of a cross-validation"),
        (("stop", "-o", "nowhere"), "-o must be the folder of a cross-validation"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: tuple[str, ...], reason: str, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


def test_an_option_that_is_given_twice_is_taken_twice(call: Call, tmp_path: Path) -> None:
    words = (
        "-tr",
        "nnUNetTrainer",
        "-tr",
        "nnUNetTrainerHalfWidth",
        "-f",
        "0",
        "-f",
        "3",
        "-c",
        "2d",
        "-c",
        "3d_fullres",
    )
    assert call(*SMALL, *words) == 0
    kept = CrossValidation.read(tmp_path / "cross_validation")
    assert [method.trainer for method in kept.methods] == ["nnUNetTrainer", "nnUNetTrainerHalfWidth"]
    assert (kept.folds, kept.configurations) == ((0, 3), ("2d", "3d_fullres"))


def test_json_is_all_that_start_prints_where_it_is_asked_for(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*SMALL, "-f", "0", "--json") == 0
    assert [record["state"] for record in json.loads(capsys.readouterr().out)] == ["not started"] * 3


def test_more_gpus_than_the_machine_has_are_refused(
    call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert call("-d", "801", "--gpus", "2") == 2
    assert "needs 2 GPUs, this machine shows 1" in capsys.readouterr().err


def test_without_submitit_the_line_that_installs_it_is_printed(
    call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert call(*SMALL) == 2
    said = capsys.readouterr().err
    assert "cv needs the extra [cluster] of this package, missing is submitit: pip install" in said


def test_a_folder_of_other_trainers_is_refused(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*SMALL) == 0
    assert call(*SMALL) == 0
    assert call(*SMALL, "-tr", "nnUNetTrainerHalfWidth") == 2
    assert "is the cross-validation of other methods" in capsys.readouterr().err


def test_failures_are_named_and_make_the_status_fail(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*SMALL, "-f", "0") == 0
    output = tmp_path / "cross_validation"
    step = next(name for name in make_steps(CrossValidation.read(output)) if "fold_0" in name)
    write_state(output, step, State(what="failed", message="OSError: no space"))
    capsys.readouterr()
    assert call("status") == 1
    shown = capsys.readouterr().out
    assert "failed: Dataset801_Fake, nnUNetTrainer, nnUNetPlans, 3d_fullres, fold 0:" in shown
    assert "OSError: no space" in shown
    assert "blocked: Dataset801_Fake, 1 step: needs nnUNetTrainer" in shown
    assert call("status", "--json") == 1
    records = {record["step"]: record for record in json.loads(capsys.readouterr().out)}
    assert records[step]["state"] == "failed"
    assert records[step]["text"] == "OSError: no space"
