"""Summaries are read as nnU-Net wrote them; anything else is one sentence that names file and cure."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nnunet_ext.comparison.run_folders import read_run
from nnunet_ext.comparison.scores import by_structure, case_means, case_name, common_cases, read_validation, structures
from nnunet_ext.errors import UsageError
from tests.comparison.conftest import MakeRun, dice_counts, summary

FOLDS = {"0": {"a": [dice_counts(0.5), dice_counts(0.7)]}, "1": {"b": [dice_counts(0.9), (0, 0, 0)]}}


def test_scores_of_all_folds_are_read(make_run: MakeRun) -> None:
    scores = read_validation(read_run(make_run("nnUNetTrainer", FOLDS)))
    assert scores["Dice"].tolist() == pytest.approx([0.5, 0.7, 0.9, np.nan], nan_ok=True)
    assert scores["fold"].tolist() == ["0", "0", "1", "1"]
    assert scores["structure"].tolist() == ["organ", "lesion"] * 2


def test_structure_without_a_value_does_not_count_in_the_case_mean(make_run: MakeRun) -> None:
    scores = read_validation(read_run(make_run("nnUNetTrainer", FOLDS)))
    assert case_means(scores)["nnUNetTrainer"].tolist() == pytest.approx([0.6, 0.9])
    assert by_structure(scores, "lesion")["nnUNetTrainer"].tolist() == pytest.approx([0.7, np.nan], nan_ok=True)


def test_regions_are_matched_to_their_names() -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    assert structures(labels) == {(1, 2): "whole", (2,): "core"}


@pytest.mark.parametrize("path", ["/a/b/case_1.nii.gz", r"C:\results\case_1.nii.gz", "case_1.nii.gz"])
def test_case_is_named_by_its_file_on_any_system(path: str) -> None:
    assert case_name(path, ".nii.gz") == "case_1"


def test_common_cases_are_those_of_every_run(make_run: MakeRun) -> None:
    import pandas as pd

    first = read_validation(read_run(make_run("nnUNetTrainer", FOLDS)))
    second = read_validation(read_run(make_run("nnUNetTrainerB", {"0": FOLDS["0"]})))
    assert common_cases(pd.concat([first, second])) == ["a"]


def first(content: dict[str, Any], label: str = "1") -> dict[str, Any]:
    return content["metric_per_case"][0]["metrics"][label]


SPOIL: dict[str, Callable[[dict[str, Any]], Any]] = {
    "above one": lambda content: first(content).update(Dice=50.0),
    "infinite": lambda content: first(content).update(Dice=float("inf")),
    "negative": lambda content: first(content).update(Dice=-0.1),
    "text": lambda content: first(content).update(Dice="good"),
    "label": lambda content: content["metric_per_case"][0]["metrics"].update({"3": first(content)}),
    "metric": lambda content: first(content).pop("Dice"),
    "ending": lambda content: content["metric_per_case"][0].update(prediction_file="/x/a.png"),
    "twice": lambda content: content["metric_per_case"].append(content["metric_per_case"][0]),
    "empty": lambda content: content["metric_per_case"].clear(),
    "foreign": lambda content: content.pop("metric_per_case"),
}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("above one", "Dice must lie between 0 and 1, got 50"),
        ("infinite", "Dice must lie between 0 and 1, got inf"),
        ("negative", "Dice must lie between 0 and 1, got -0.1"),
        ("text", "nnU-Net did not write"),
        ("label", r"must have the labels of dataset.json .* a has"),
        ("metric", "nnU-Net did not write"),
        ("ending", r"a.png does not end in .nii.gz"),
        ("twice", "holds a twice"),
        ("empty", "metric_per_case"),
        ("foreign", "metric_per_case"),
    ],
)
def test_spoiled_summary_is_named_with_the_cure(make_run: MakeRun, what: str, message: str) -> None:
    folder = make_run("nnUNetTrainer", FOLDS)
    path = folder / "fold_0" / "validation" / "summary.json"
    content = summary(FOLDS["0"])
    SPOIL[what](content)
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message) as caught:
        read_validation(read_run(folder))
    assert str(path) in str(caught.value)
    assert "nnUNetv2_train Dataset007_Toy 3d_fullres 0 -tr nnUNetTrainer -p nnUNetPlans --val" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_written_summary_is_named_with_the_cure(make_run: MakeRun) -> None:
    folder = make_run("nnUNetTrainer", FOLDS)
    path = folder / "fold_1" / "validation" / "summary.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(UsageError, match=rf"{path} can't be read .*validate the fold again"):
        read_validation(read_run(folder))


def test_case_in_two_folds_is_refused(make_run: MakeRun) -> None:
    folder = make_run("nnUNetTrainer", {"0": FOLDS["0"], "1": FOLDS["0"]})
    with pytest.raises(UsageError, match=r"a of .* is in the folds 0 and 1"):
        read_validation(read_run(folder))


def test_summary_without_counts_and_iou_is_read(make_run: MakeRun) -> None:
    folder = make_run("nnUNetTrainer", {"0": FOLDS["0"]})
    content = summary(FOLDS["0"])
    content["metric_per_case"][0]["metrics"] = {"1": {"Dice": 0.5}, "2": {"Dice": None}}
    (folder / "fold_0" / "validation" / "summary.json").write_text(json.dumps(content))
    scores = read_validation(read_run(folder))
    assert scores["Dice"].tolist() == pytest.approx([0.5, np.nan], nan_ok=True)
    assert scores["IoU"].tolist() == pytest.approx([1 / 3, np.nan], nan_ok=True)
    assert scores["TP"].isna().all()
