"""Which preprocessed data new plans use, and what becomes of images with an axis of one voxel."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from nnunet_ext.plans.memory_planner import MemoryPlanner
from nnunet_ext.plans.reversible_unet_planner import ReversibleUNetPlanner

SHAPES, SPACINGS = [[40, 48, 52], [44, 40, 48]], [[1.0, 1.0, 1.0], [1.1, 1.0, 1.0]]
OWN, SHARED = "nnUNetReversiblePlans_3d_fullres", "nnUNetPlans_3d_fullres"


@pytest.fixture(autouse=True)
def without_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch and batch as nnU-Net chooses them: only data and axes matter here."""
    monkeypatch.setattr(MemoryPlanner, "_fitted", lambda self, plan, asked, draft=False: plan)
    monkeypatch.setattr(  # nnU-Net starts twelve processes for it
        "nnunetv2.experiment_planning.experiment_planners.default_experiment_planner."
        "get_filenames_of_train_images_and_targets",
        lambda raw, _: {case: {"images": [f"{raw}/imagesTr/{case}_0000.nii.gz"]} for case in "ab"},
    )


@pytest.fixture
def folder(workspace: Path, unused_number: Callable[[], int]) -> Path:
    """A data set of two cases with a fingerprint, not planned; its folder in nnUNet_preprocessed."""
    name = f"Dataset{unused_number()}_Planned"
    raw, folder = workspace / "raw" / name, workspace / "preprocessed" / name
    for part in (raw / "imagesTr", raw / "labelsTr", folder):
        part.mkdir(parents=True)
    image = sitk.GetImageFromArray(np.zeros((4, 4, 4), dtype=np.uint8))
    for case in ("a", "b"):
        sitk.WriteImage(image, str(raw / "imagesTr" / f"{case}_0000.nii.gz"))
        sitk.WriteImage(image, str(raw / "labelsTr" / f"{case}.nii.gz"))
    description = {"labels": {"background": 0, "a": 1}, "numTraining": 2, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, **description}))
    write_fingerprint(folder, SHAPES, SPACINGS)
    return folder


def write_fingerprint(folder: Path, shapes: Any, spacings: Any, mean: float = 5.0) -> None:
    statistics = dict.fromkeys(("max", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
    content = {
        "shapes_after_crop": shapes,
        "spacings": spacings,
        "foreground_intensity_properties_per_channel": {"0": {"mean": mean, **statistics}},
        "median_relative_size_after_cropping": 1.0,
    }
    (folder / "dataset_fingerprint.json").write_text(json.dumps(content))


def plan(folder: Path, planner: type = ReversibleUNetPlanner, **options: Any) -> dict[str, Any]:
    """Plans as they lie on disk."""
    made = planner(folder.name, **options)
    made.plan_experiment()
    return json.loads((folder / f"{made.plans_identifier}.json").read_text())


def identifier(plans: dict[str, Any]) -> str:
    return plans["configurations"]["3d_fullres"]["data_identifier"]


def write_data(folder: Path, spacing: tuple[float, ...] = (1.05, 1.0, 1.0)) -> None:
    """What preprocessing with this spacing leaves in the folder of default nnU-Net."""
    (folder / SHARED).mkdir()
    for case, shape, own in zip("ab", SHAPES, SPACINGS, strict=True):
        data = np.zeros((1, *compute_new_shape(shape, own, spacing)), dtype=np.float32)
        for part in ("", "_seg"):
            blosc2.asarray(data, urlpath=str(folder / SHARED / f"{case}{part}.b2nd"))
        (folder / SHARED / f"{case}.pkl").touch()


def test_data_of_default_plans_are_reused_where_they_are_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(folder, ExperimentPlanner)
    write_data(folder)
    assert identifier(plan(folder)) == SHARED
    assert "-plans_name nnUNetReversiblePlans -c 2d\n" in capsys.readouterr().out


def test_data_of_another_spacing_are_left_alone_and_the_command_for_own_ones_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(folder, ExperimentPlanner, overwrite_target_spacing=[2.0, 2.0, 2.0])
    write_data(folder, (2.0, 2.0, 2.0))
    plans = plan(folder)
    assert identifier(plans) == OWN
    assert plans["configurations"]["2d"]["data_identifier"] == "nnUNetReversiblePlans_2d"
    said = capsys.readouterr().out
    assert f"does not use the preprocessed data {SHARED}: nnUNetPlans has other spacing, [2.0, 2.0, 2.0]" in said
    number = folder.name[len("Dataset") :][:3]
    assert f"nnUNetv2_preprocess -d {number} -plans_name nnUNetReversiblePlans -c 2d 3d_fullres\n" in said


def set_in_configuration(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plans: plans["configurations"]["3d_fullres"].update({key: value})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_in_configuration("normalization_schemes", ["ZScoreNormalization"]), "other normalization_schemes"),
        (set_in_configuration("use_mask_for_norm", [True]), "other use_mask_for_norm"),
        (set_in_configuration("preprocessor_name", "Mine"), "other preprocessor_name"),
        (set_in_configuration("resampling_fn_data", "resample_torch_fornnunet"), "other resampling_fn_data"),
        (set_in_configuration("resampling_fn_seg_kwargs", {"is_seg": True}), "other resampling_fn_seg_kwargs"),
        (lambda plans: plans.update(transpose_forward=[1, 0, 2]), "other transpose_forward"),
        (lambda plans: plans.update(image_reader_writer="NibabelIO"), "other image_reader_writer"),
        (lambda plans: plans["configurations"]["3d_fullres"].pop("normalization_schemes"), "does not say how"),
    ],
)
def test_data_made_in_another_way_are_left_alone(
    change: Callable[[dict[str, Any]], None], reason: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = plan(folder, ExperimentPlanner)
    change(plans)
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert identifier(plan(folder)) == OWN
    assert reason in capsys.readouterr().out


def test_a_configuration_that_inherits_owns_its_data_too(folder: Path) -> None:
    plans = plan(folder, ExperimentPlanner)
    plans["configurations"]["coarse"] = {"inherits_from": "3d_fullres", "spacing": [2.0, 2.0, 2.0]}
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert identifier(plan(folder)) == OWN


def test_data_of_an_older_fingerprint_are_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(folder, ExperimentPlanner)
    write_fingerprint(folder, SHAPES, SPACINGS, mean=6.0)
    assert identifier(plan(folder)) == OWN
    assert "other intensities of the data set's fingerprint" in capsys.readouterr().out


def test_data_that_are_not_what_their_plans_say_are_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(folder, (2.0, 2.0, 2.0))
    plan(folder, ExperimentPlanner)  # planned again and not preprocessed
    assert identifier(plan(folder)) == OWN
    assert "a.b2nd there has the shape [20, 24, 26], with this spacing it has [38, 48, 52]" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a_seg.b2nd", "a.pkl"])
def test_a_case_without_all_its_files_is_to_be_preprocessed(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(folder, ExperimentPlanner)
    write_data(folder)
    (folder / SHARED / name).unlink()
    assert identifier(plan(folder)) == SHARED
    assert "-plans_name nnUNetReversiblePlans -c 2d 3d_fullres\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.b2nd", "a_seg.b2nd"])
def test_data_that_were_cut_off_are_left_alone(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(folder, ExperimentPlanner)
    write_data(folder)
    path = folder / SHARED / name
    path.write_bytes(path.read_bytes()[:-10])
    assert identifier(plan(folder)) == OWN
    assert f"{name} there is cut off." in capsys.readouterr().out


def test_data_of_earlier_plans_of_the_same_name_are_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(folder)
    write_data(folder)  # preprocessed with our plans, there are no others
    assert identifier(plan(folder)) == SHARED
    write_fingerprint(folder, SHAPES, SPACINGS, mean=6.0)
    assert identifier(plan(folder)) == OWN
    assert f"{SHARED}: nnUNetReversiblePlans has other intensities" in capsys.readouterr().out


def test_own_data_of_earlier_plans_are_to_be_preprocessed_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(folder, ExperimentPlanner, overwrite_target_spacing=[2.0, 2.0, 2.0])
    assert identifier(plan(folder)) == OWN
    write_data(folder)
    (folder / SHARED).rename(folder / OWN)
    plan(folder)
    assert "nnUNetReversiblePlans -c 2d\n" in capsys.readouterr().out
    write_fingerprint(folder, SHAPES, SPACINGS, mean=6.0)
    assert identifier(plan(folder)) == OWN
    assert "nnUNetReversiblePlans -c 2d 3d_fullres\n" in capsys.readouterr().out


def test_a_fingerprint_of_other_cases_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fingerprint(folder, SHAPES[:1], SPACINGS[:1])
    plan(folder)
    assert "knows 1 case, the data set has 2: extract it again" in capsys.readouterr().out


def test_broken_files_beside_the_plans_do_not_matter(folder: Path) -> None:
    plan(folder, ExperimentPlanner)
    loop = {"plans_name": "Loop", "configurations": {"x": {"inherits_from": "y"}, "y": {"inherits_from": "x"}}}
    (folder / "Loop.json").write_text(json.dumps(loop))
    (folder / "cut.json").write_text('{"configurations": {')
    (folder / "splits_final.json").write_text("[]")
    assert identifier(plan(folder)) == SHARED


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("thick", [False, True], ids=["cubic", "thick slices"])
def test_images_with_an_axis_of_one_voxel_are_planned_in_2d_across_it(axis: int, thick: bool, folder: Path) -> None:
    shape, spacing = [200, 200, 200], [1.0, 1.0, 1.0]
    shape[axis], spacing[axis] = 1, 5.0 if thick else 1.0
    write_fingerprint(folder, [shape] * 2, [spacing] * 2)
    plans = plan(folder)
    assert list(plans["configurations"]) == ["2d"]
    assert min(plans["configurations"]["2d"]["patch_size"]) >= 100
    assert plans["transpose_forward"][0] == axis
    forward, backward = plans["transpose_forward"], plans["transpose_backward"]
    assert [forward[i] for i in backward] == [0, 1, 2]


def test_images_that_become_one_voxel_by_resampling_are_2d_too(folder: Path) -> None:
    write_fingerprint(folder, [[200, 200, 2]] * 2, [[1.0, 1.0, 1.0]] * 2)
    plans = plan(folder, overwrite_target_spacing=[1.0, 1.0, 3.0])
    assert list(plans["configurations"]) == ["2d"]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [([1, 200, 1], {}, "size of \\[1, 200, 1\\] voxels: "), ([200, 200, 1], {"suppress_transpose": True}, "without")],
)
def test_images_that_can_not_be_planned_are_refused(
    shape: list[int], options: dict[str, Any], message: str, folder: Path
) -> None:
    write_fingerprint(folder, [shape] * 2, [[1.0, 1.0, 1.0]] * 2)
    with pytest.raises(ValueError, match=message):
        plan(folder, **options)
