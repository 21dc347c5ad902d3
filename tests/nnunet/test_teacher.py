"""Who may teach whom: what a user may ask for, what a teacher must have in common with its student, and no leaks."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT
from nnunet_ext.nnunet.model_folder import ModelFolder
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.teacher import VARIABLE, Request, check_fits, find_teacher, held_out, teaching_folds
from tests.settings import tiny

SPLITS = [{"train": ["b", "c"], "val": ["a"]}, {"train": ["a", "c"], "val": ["b"]}, {"train": ["a", "b"], "val": ["c"]}]


@pytest.fixture(autouse=True)
def _nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def model(tmp_path: Path, setting: Setting) -> ModelFolder:
    """A trained model of three folds; its checkpoints are empty files."""
    folder = tmp_path / "results" / "Dataset007_Tiny" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    for fold, split in enumerate(SPLITS):
        validated = folder / f"fold_{fold}" / "validation"
        validated.mkdir(parents=True)
        (validated.parent / FINAL_CHECKPOINT).touch()
        rows = [{"prediction_file": f"/elsewhere/{case}.nii.gz"} for case in split["val"]]
        (validated / "summary.json").write_text(json.dumps({"metric_per_case": rows}))
    (folder / "plans.json").write_text(json.dumps({**setting.plans, "dataset_name": "Dataset007_Tiny"}))
    (folder / "dataset.json").write_text(json.dumps({**setting.dataset, "file_ending": ".nii.gz"}))
    return ModelFolder.read(folder, "", "")


# ---------------------------------------------------------------------------------------------------- request
def test_plans_and_environment_say_who_teaches_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {"distillation": {"teacher": "planned", "weight": 1}}
    assert Request.of({}, temperature=3.0) == Request(temperature=3.0)
    assert Request.of(plans, weight=0.2) == Request(teacher="planned", weight=1)
    monkeypatch.setenv(VARIABLE, "named")
    assert Request.of(plans).teacher == "named"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"teachers": "x"}, "must hold teacher, temperature, weight, unlabelled, unlabelled_share, got"),
        ("x", "must hold teacher, temperature"),
        ({"teacher": ""}, "teacher: must be the folder of a trained model, got ''"),
        ({"temperature": 0}, "temperature: must be a number above 0, got 0"),
        ({"temperature": True}, "temperature: must be a number above 0, got True"),
        ({"temperature": float("nan")}, "temperature: must be a number above 0, got nan"),
        ({"weight": 1.5}, "weight: must be a number from 0 to 1, got 1.5"),
        ({"weight": "0.5"}, "weight: must be a number from 0 to 1, got '0.5'"),
        ({"unlabelled": 3}, "unlabelled: must be a folder of images, got 3"),
        ({"unlabelled_share": 1}, "unlabelled_share: must be a number between 0 and 1, got 1"),
    ],
)
def test_what_plans_must_not_ask_for_is_said(asked: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        Request.of({"distillation": asked})


def test_a_teacher_is_found_by_path_or_by_its_name_in_the_results(
    model: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    assert find_teacher(str(model.folder), "Dataset001_Other").folder == model.folder
    assert find_teacher(model.folder.name, "Dataset007_Tiny").folder == model.folder
    assert find_teacher(f"Dataset007_Tiny/{model.folder.name}", "Dataset001_Other").folder == model.folder
    monkeypatch.chdir(model.folder.parent)
    assert find_teacher(f" ./{model.folder.name} ".strip(), "Dataset001_Other").folder == model.folder
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"must be an existing folder, got .*Dataset001_Other"):
        find_teacher(model.folder.name, "Dataset001_Other")
    with pytest.raises(UsageError, match="needs a teacher, none is named: set nnUNet_teacher"):
        find_teacher(None, "Dataset007_Tiny")


# ---------------------------------------------------------------------------------------------------- what fits
def changed(setting: Setting, **facts: Any) -> Setting:
    """The setting with other values in its plans, its configuration or its data set, by the key before a dot."""
    plans, dataset = deepcopy(dict(setting.plans)), dict(setting.dataset)
    for key, value in facts.items():
        place = {"plans": plans, "dataset": dataset}.get(key.split("__")[0], plans["configurations"]["3d_fullres"])
        place[key.split("__")[-1]] = value
    return Setting(plans=plans, dataset=dataset, configuration=setting.configuration)


def test_teacher_with_other_features_patch_and_batch_fits(setting: Setting) -> None:
    check_fits(changed(setting, patch_size=[32, 32, 32], batch_size=7, spacing=[1.0000001, 1, 1]), setting, Path())


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        ({"plans__dataset_name": "Dataset001_Other"}, "data set"),
        ({"dataset__labels": {"background": 0, "one": 1}}, "labels"),
        ({"dataset__channel_names": {"0": "CT"}}, "channel_names"),
        ({"dataset__regions_class_order": [2, 1]}, "regions_class_order"),
        ({"plans__transpose_forward": [2, 1, 0]}, "order of axes"),
        ({"spacing": [2.0, 1.0, 1.0]}, "spacing"),
        ({"normalization_schemes": ["CTNormalization"]}, "normalization_schemes"),
        ({"use_mask_for_norm": [True]}, "use_mask_for_norm"),
        ({"preprocessor_name": "Other"}, "preprocessor_name"),
        ({"previous_stage": "3d_lowres"}, "cascade stage"),
    ],
)
def test_teacher_of_other_data_is_refused(setting: Setting, facts: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=f"the teacher must have the student's {what}, .* got .* in teacher: name a"):
        check_fits(changed(setting, **facts), setting, Path("teacher"))


def test_intensities_must_agree_where_they_normalise(setting: Setting) -> None:
    student = changed(
        setting,
        normalization_schemes=["CTNormalization"],
        plans__foreground_intensity_properties_per_channel={"0": {"mean": 1.0}},
    )
    check_fits(student, student, Path())
    teacher = changed(student, plans__foreground_intensity_properties_per_channel={"0": {"mean": 2.0}})
    with pytest.raises(UsageError, match="student's intensities of the foreground"):
        check_fits(teacher, student, Path())


def test_teacher_of_other_axes_is_refused(setting: Setting) -> None:
    with pytest.raises(UsageError, match="student's number of axes, 3, got 2"):
        check_fits(tiny((16, 16)), setting, Path())


def test_patch_that_the_teachers_strides_do_not_divide_is_refused(setting: Setting) -> None:
    with pytest.raises(
        UsageError, match=r"patch \[18, 16, 16\] must be divisible by .* \[4, 4, 4\]: change patch_size"
    ):
        check_fits(setting, changed(setting, patch_size=[18, 16, 16]), Path())


# ---------------------------------------------------------------------------------------------------- who has seen what
def test_a_fold_is_taught_by_itself_and_all_cases_by_the_fold_that_held_each_back(model: ModelFolder) -> None:
    assert held_out(model, "1") == {"b"}
    assert teaching_folds(model, 1, ["a", "c"], ["b"], SPLITS) == {"a": "1", "c": "1"}
    assert teaching_folds(model, "all", ["a", "b", "c"], ["a", "b", "c"], SPLITS) == {"a": "0", "b": "1", "c": "2"}
    assert teaching_folds(model, "all", ["a", "b", "c"], ["a", "b", "c"], []) == {"a": "0", "b": "1", "c": "2"}


def _without(fold: int, name: str) -> Callable[[ModelFolder], None]:
    return lambda model: (model.fold_folder(str(fold)) / name).unlink()


def _validated(fold: int, *cases: str) -> Callable[[ModelFolder], None]:
    rows = [{"prediction_file": f"C:\\elsewhere\\{case}.nii.gz"} for case in cases]
    return lambda model: _write(model, fold, {"metric_per_case": rows})


def _write(model: ModelFolder, fold: int, content: Any) -> None:
    (model.fold_folder(str(fold)) / "validation" / "summary.json").write_text(json.dumps(content))


def _logged(fold: int, *lines: str) -> Callable[[ModelFolder], None]:
    return lambda model: (model.fold_folder(str(fold)) / "training_log_2026_1_1.txt").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("fold", "damage", "message"),
    [
        (
            1,
            _without(1, FINAL_CHECKPOINT),
            "fold 1 may be taught by the teacher's fold 1 alone.* has .* of 0, 2: train",
        ),
        (1, _without(1, "validation/summary.json"), "summary.json is missing: validate fold 1 of the teacher"),
        (1, lambda model: _write(model, 1, {}), "must hold nnU-Net's metric_per_case, it does not: validate fold 1"),
        (1, _validated(1, "c"), r"must have held back .* its validation lacks 1 case \(b; .*train the teacher"),
        (1, _validated(1, "b", "c"), r"must not have validated training cases .* it has 1 case \(c; .*Train the teach"),
        (
            "all",
            _without(2, FINAL_CHECKPOINT),
            r"no fold of .* has held back 1 case \(c\): train and validate the miss",
        ),
        ("all", _validated(0, "a", "b"), r"must not have validated training cases .* it has 1 case \(b; "),
        ("all", _without(0, "validation/summary.json"), "summary.json is missing: validate fold 0"),
        (
            1,
            _logged(1, "This split has 3 training and 1 validation cases."),
            "which has 2 .* tells of 3 training cases",
        ),
        ("all", _logged(2, "This split has 3 training and 1 validation cases."), "fold 2 .* tells of 3 training cases"),
        (
            0,
            _logged(0, "WARNING: Some validation cases are also in the training set. Please check the splits.json"),
            "tells of validation cases that were training cases too: train the teacher with this split",
        ),
    ],
)
def test_what_would_leak_is_refused(
    model: ModelFolder, fold: int | str, damage: Callable[[ModelFolder], None], message: str
) -> None:
    damage(model)
    training, validation = (["a", "b", "c"],) * 2 if fold == "all" else SPLITS[int(fold)].values()
    with pytest.raises(UsageError, match=message):
        teaching_folds(model, fold, training, validation, SPLITS)


def test_a_log_of_the_same_split_is_no_hindrance(model: ModelFolder) -> None:
    _logged(1, "This split has 2 training and 1 validation cases.", "Epoch 0")(model)
    assert teaching_folds(model, 1, ["a", "c"], ["b"], SPLITS) == {"a": "1", "c": "1"}
    assert teaching_folds(model, "all", ["a", "b", "c"], ["a", "b", "c"], SPLITS)["b"] == "1"


def test_a_model_trained_on_all_cases_teaches_nobody(model: ModelFolder) -> None:
    for fold in range(3):
        (model.fold_folder(str(fold)) / FINAL_CHECKPOINT).unlink()
    (model.folder / "fold_all").mkdir()
    (model.folder / "fold_all" / FINAL_CHECKPOINT).touch()
    with pytest.raises(UsageError, match=r"no fold of .* has held back 3 cases"):
        teaching_folds(model, "all", ["a", "b", "c"], ["a", "b", "c"], SPLITS)
    with pytest.raises(UsageError, match=r"fold 0 alone.* of all: train"):
        teaching_folds(model, 0, ["b", "c"], ["a"], SPLITS)


def test_a_split_that_has_changed_since_is_refused(model: ModelFolder) -> None:
    """The teacher's fold 1 held back b; the split now says a."""
    splits = [SPLITS[1], SPLITS[0]]
    with pytest.raises(UsageError, match=r"validation lacks 1 case \(a; "):
        teaching_folds(model, 1, splits[1]["train"], splits[1]["val"], splits)
