from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nnunet_ext.cluster.request import (
    CrossValidation,
    Method,
    find_datasets,
    folders_of_environment,
    methods_of,
    planner_of,
)
from nnunet_ext.errors import UsageError
from tests.cluster.conftest import DATASET, Asked


def test_each_trainer_takes_all_plans_or_those_of_its_own() -> None:
    found = methods_of(["A", "B:Q"], ["P", "R"])
    assert found == tuple(Method(trainer=t, plans=p) for t, p in (("A", "P"), ("A", "R"), ("B", "Q")))


@pytest.mark.parametrize("trainers", [["A:"], [":P"], ["A", "A"], ["A", "A:P"]])
def test_half_a_pair_and_a_method_named_twice_are_refused(trainers: list[str]) -> None:
    with pytest.raises(UsageError, match="-tr"):
        methods_of(trainers, ["P"])


def test_missing_plans_are_made_by_the_planner_that_calls_them_so() -> None:
    assert planner_of("nnUNetPlans") == "ExperimentPlanner"
    assert planner_of("nnUNetResEncUNetXLPlans") == "nnUNetPlannerResEncXL"
    assert planner_of("nnUNetReversiblePlans") == "ReversibleUNetPlanner"
    with pytest.raises(UsageError, match="-overwrite_plans_name mine"):
        planner_of("mine")


def test_what_is_asked_for_is_read_back(asked: Asked) -> None:
    made = asked(folds=(0, 2))
    assert CrossValidation.read(made.output) == made


def test_a_folder_of_other_trainers_is_refused_in_one_sentence(asked: Asked) -> None:
    made = asked()
    other = replace(made, methods=(Method(trainer="nnUNetTrainerReversible", plans="nnUNetPlans"),))
    with pytest.raises(UsageError, match=r"other methods \(nnUNetTrainer_3epochs:nnUNetPlans; now nnUNetTrainerRev"):
        other.open()
    with pytest.raises(UsageError, match="other folds"):
        replace(made, folds=(1,)).open()


def test_how_it_is_computed_may_change(asked: Asked) -> None:
    replace(asked(), device="cuda", gpus=2).open()


def test_folds_outside_the_split_are_refused(asked: Asked) -> None:
    with pytest.raises(UsageError, match=r"0 1 2 3 4, got 5"):
        asked(folds=(0, 5)).check()
    made = asked(folds=(0, 5))
    path = made.preprocessed / DATASET / "splits_final.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([{"train": [], "val": []}] * 6))
    made.check()


def test_plans_and_configurations_that_nobody_has_are_refused(asked: Asked) -> None:
    made = asked()
    with pytest.raises(UsageError, match="got mine"):
        replace(made, methods=(Method(trainer="nnUNetTrainer", plans="mine"),)).check()
    folder = made.preprocessed / DATASET
    folder.mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text(json.dumps({"configurations": {"2d": {}}}))
    with pytest.raises(UsageError, match="has no 3d_fullres, but 2d"):
        made.check()


def test_data_sets_are_found_raw_or_preprocessed(asked: Asked, tmp_path: Path) -> None:
    made = asked()
    (made.preprocessed / "Dataset802_Preprocessed").mkdir(parents=True)
    found = find_datasets(["801", "Dataset802_Preprocessed"], made.raw, made.preprocessed)
    assert found == (DATASET, "Dataset802_Preprocessed")
    for wrong in (["803"], ["801", DATASET]):
        with pytest.raises(UsageError, match="-d must"):
            find_datasets(wrong, made.raw, made.preprocessed)


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    monkeypatch.setenv("nnUNet_raw", "raw")
    with pytest.raises(UsageError, match="nnUNet_preprocessed, which is not set"):
        folders_of_environment()


def test_a_folder_of_something_else_is_none_of_a_cross_validation(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no cross_validation\.json"):
        CrossValidation.read(tmp_path)
    (tmp_path / "cross_validation.json").write_text("{}")
    with pytest.raises(UsageError, match="damaged"):
        CrossValidation.read(tmp_path)
