"""Runs are found by names or folders; what is missing is named together with what is there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from nnunet_ext.comparison.run_folders import find_runs, labelled, read_run
from nnunet_ext.comparison.training import logged_validations
from nnunet_ext.errors import UsageError
from tests.comparison.conftest import MakeRun, random_folds

FOLDS = random_folds(0)


@pytest.mark.parametrize("dataset", ["7", "007", "Dataset007_Toy"])
def test_runs_are_found_by_number_or_name(make_run: MakeRun, tmp_path: Path, dataset: str) -> None:
    a, b = make_run("nnUNetTrainer", FOLDS), make_run("nnUNetTrainerB", FOLDS)
    found = find_runs(
        tmp_path / "results", dataset, ["3d_fullres"], ["nnUNetTrainer", "nnUNetTrainerB"], ["nnUNetPlans"]
    )
    assert found == [a, b]


def test_combinations_that_were_not_trained_are_left_out(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("nnUNetTrainer", FOLDS)
    make_run("nnUNetTrainer", FOLDS, plans="P2")
    make_run("nnUNetTrainerB", FOLDS)
    found = find_runs(
        tmp_path / "results", "7", ["3d_fullres"], ["nnUNetTrainer", "nnUNetTrainerB"], ["nnUNetPlans", "P2"]
    )
    assert [folder.name.rpartition("__")[0] for folder in found] == [
        "nnUNetTrainer__nnUNetPlans",
        "nnUNetTrainer__P2",
        "nnUNetTrainerB__nnUNetPlans",
    ]


@pytest.mark.parametrize(
    ("dataset", "configuration", "trainer", "plans", "message"),
    [
        ("8", "3d_fullres", "nnUNetTrainer", "nnUNetPlans", "got 8: there is Dataset007_Toy"),
        (
            "7",
            "2d",
            "nnUNetTrainer",
            "nnUNetPlans",
            "-c needs runs .* got 2d: .*nnUNetTrainer__nnUNetPlans__3d_fullres",
        ),
        ("7", "3d_fullres", "nnUNetTrainerX", "nnUNetPlans", "-tr needs runs .* got nnUNetTrainerX"),
        ("7", "3d_fullres", "nnUNetTrainer", "Other", "-p needs runs .* got Other"),
    ],
)
def test_missing_run_is_named_with_those_that_are_there(
    make_run: MakeRun, tmp_path: Path, dataset: str, configuration: str, trainer: str, plans: str, message: str
) -> None:
    make_run("nnUNetTrainer", FOLDS)
    with pytest.raises(UsageError, match=message):
        find_runs(tmp_path / "results", dataset, [configuration], [trainer], [plans])


def test_folds_are_all_that_are_validated_except_all(make_run: MakeRun) -> None:
    folder = make_run("nnUNetTrainer", {**FOLDS, "10": {}, "all": {}})
    (folder / "fold_2" / "validation").mkdir(parents=True)  # a validation that has not ended
    assert read_run(folder).folds == ("0", "1", "10")


def test_asked_fold_that_is_not_validated_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(UsageError, match=r"fold_3 of .* has no validation/summary.json: call `nnUNetv2_train"):
        read_run(make_run("nnUNetTrainer", FOLDS), ["0", "3"])


def test_run_without_any_validation_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(UsageError, match="must hold a validated fold"):
        read_run(make_run("nnUNetTrainer", {}))


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_missing_or_foreign_description_is_named(make_run: MakeRun, name: str, content: str | None) -> None:
    folder = make_run("nnUNetTrainer", FOLDS)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UsageError, match=rf"{name}.*copy the complete folder"):
        read_run(folder)


def test_renamed_folder_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    shutil.copytree(make_run("nnUNetTrainer", FOLDS), tmp_path / "mine")
    with pytest.raises(UsageError, match="TRAINER__PLANS__CONFIGURATION"):
        read_run(tmp_path / "mine")


def test_labels_hold_what_differs(make_run: MakeRun) -> None:
    runs = [
        read_run(make_run(t, FOLDS, p)) for t, p in (("nnUNetTrainer_4epochs", "P1"), ("nnUNetTrainer_4epochs", "P2"))
    ]
    assert [run.label for run in labelled(runs)] == ["nnUNetTrainer, P1", "nnUNetTrainer, P2"]
    assert [run.label for run in labelled(runs[:1])] == ["nnUNetTrainer"]
    assert [run.label for run in labelled(runs, ["A", "B"])] == ["A", "B"]


def test_schedule_stays_in_the_labels_where_it_differs(make_run: MakeRun) -> None:
    runs = [read_run(make_run(t, FOLDS)) for t in ("nnUNetTrainer_4epochs", "nnUNetTrainer_8epochs")]
    assert [run.label for run in labelled(runs)] == ["nnUNetTrainer_4epochs", "nnUNetTrainer_8epochs"]


def test_same_run_of_two_machines_is_told_apart_by_its_place(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("nnUNetTrainer", FOLDS)
    copy = tmp_path / "copied" / folder.name
    shutil.copytree(folder, copy)
    labels = [run.label for run in labelled([read_run(folder), read_run(copy)])]
    assert labels == ["nnUNetTrainer (Dataset007_Toy)", "nnUNetTrainer (copied)"]


def test_run_given_twice_and_wrong_names_are_refused(make_run: MakeRun) -> None:
    run = read_run(make_run("nnUNetTrainer", FOLDS))
    with pytest.raises(UsageError, match="may be given once"):
        labelled([run, run])
    with pytest.raises(UsageError, match="--names needs 1 different names, got A B"):
        labelled([run], ["A", "B"])


def test_inherited_configuration_is_resolved(make_run: MakeRun) -> None:
    from dataclasses import replace

    run = read_run(make_run("nnUNetTrainer", FOLDS))
    plans = {"configurations": {**run.plans["configurations"], "bs4": {"inherits_from": "3d_fullres", "batch_size": 4}}}
    settings = replace(run, folder=run.folder.with_name("nnUNetTrainer__nnUNetPlans__bs4"), plans=plans).settings
    assert (settings["batch_size"], settings["patch_size"]) == (4, [16, 16, 16])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_called_like_a_log_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "training_log_1.txt")
    (tmp_path / "training_log_2.txt").write_text("Mean Validation Dice:  0.5\n")
    assert logged_validations(tmp_path) == [0.5]
