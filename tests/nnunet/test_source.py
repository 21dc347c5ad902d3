"""Settings from a data set, a plans file or a patch, and every mistake on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_ext.benchmark.counting import passes_mirrored, tiles_per_case
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.source import Source


def test_patch_of_128_is_planned_as_nnunet_plans_it() -> None:
    setting = Source(patch=(128, 128, 128)).setting()
    arguments = setting.configuration_manager.network_arch_init_kwargs
    assert arguments["features_per_stage"] == [32, 64, 128, 256, 320, 320]
    assert arguments["strides"] == [[1, 1, 1]] + [[2, 2, 2]] * 5
    assert arguments["kernel_sizes"] == [[3, 3, 3]] * 6
    assert (setting.patch_size, setting.batch_size, setting.configuration) == ((128,) * 3, 2, "3d_fullres")
    assert setting.plans["plans_name"]


def test_two_numbers_are_planned_in_2d() -> None:
    setting = Source(patch=(512, 512), channels=3).setting()
    network = setting.builder("nnUNetTrainer")()
    assert type(network) is PlainConvUNet
    assert isinstance(network.encoder.stages[0][0].convs[0].conv, nn.Conv2d)
    assert max(setting.configuration_manager.network_arch_init_kwargs["features_per_stage"]) == 512
    assert (setting.configuration, setting.input_channels) == ("2d", 3)


def test_patch_is_rounded_up_to_the_strides() -> None:
    assert Source(patch=(100, 100, 30)).setting().patch_size == (112, 112, 32)


def test_plan_of_a_patch_is_that_of_nnunets_own_planner_for_the_same_size() -> None:
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    _, strides, kernels, patch, _ = get_pool_and_conv_props((1.0, 1.0, 1.0), (96, 160, 64), 4, 999999)
    setting = Source(patch=(96, 160, 64)).setting()
    arguments = setting.configuration_manager.network_arch_init_kwargs
    assert [tuple(s) for s in arguments["strides"]] == list(strides)
    assert [tuple(k) for k in arguments["kernel_sizes"]] == [tuple(k) for k in kernels]
    assert setting.patch_size == tuple(int(n) for n in patch)


def test_channels_classes_and_batch_are_taken_over() -> None:
    setting = Source(patch=(16, 16, 16), channels=4, classes=7, batch=5).setting()
    assert (setting.input_channels, setting.num_classes, setting.batch_size) == (4, 7, 5)


@pytest.mark.parametrize("dataset", ["7", "007", "Dataset007_Tiny"])
def test_data_set_is_found_by_number_and_name(planned_dataset: Path, dataset: str) -> None:
    setting = Source(dataset=dataset, configuration="3d_fullres").setting()
    assert (setting.input_channels, setting.num_classes) == (2, 2)


def test_plans_file_takes_the_dataset_beside_it(planned_dataset: Path) -> None:
    setting = Source(plans_file=planned_dataset / "nnUNetPlans.json").setting()
    assert (setting.configuration, setting.input_channels, setting.num_classes) == ("3d_fullres", 2, 2)


def test_plans_file_alone_gets_one_channel_and_three_classes(planned_dataset: Path) -> None:
    (planned_dataset / "dataset.json").unlink()
    setting = Source(plans_file=planned_dataset / "nnUNetPlans.json", configuration="2d").setting()
    assert (setting.configuration, setting.input_channels, setting.num_classes) == ("2d", 1, 3)


def test_only_configuration_of_a_plans_file_needs_no_name(tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    file.write_text(json.dumps(Source(patch=(32, 32)).setting().plans), encoding="utf-8")
    assert Source(plans_file=file).setting().configuration == "2d"


def test_options_overrule_the_dataset(planned_dataset: Path) -> None:
    setting = Source(dataset="7", configuration="3d_half", channels=3, classes=5).setting()
    assert (setting.input_channels, setting.num_classes, setting.batch_size) == (3, 5, 1)
    assert Source(dataset="7", configuration="3d_half", batch=4).setting().batch_size == 4


def test_tiles_are_counted_as_the_sliding_window_steps(planned_dataset: Path) -> None:
    # 16x24x40 voxels, tiles of 16 in steps of at most 8: 1, 2 and 4 per axis.
    volume = Source(dataset="7", configuration="3d_fullres").setting()
    assert (tiles_per_case(volume), passes_mirrored(volume)) == (8, 8)
    plane = Source(dataset="7", configuration="2d").setting()
    assert (tiles_per_case(plane), passes_mirrored(plane)) == (16 * 2 * 4, 4)


def test_patch_alone_has_no_case() -> None:
    assert tiles_per_case(Source(patch=(16, 16, 16)).setting()) is None


def test_image_smaller_than_the_patch_is_one_tile(planned_dataset: Path) -> None:
    path = planned_dataset / "nnUNetPlans.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["median_image_size_in_voxels"] = [4.0, 9.0, 16.0]
    path.write_text(json.dumps(plans), encoding="utf-8")
    assert tiles_per_case(Source(dataset="7", configuration="3d_fullres").setting()) == 1


PATCH = (16, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of -d, --plans and --patch is needed, got none"),
        ({"dataset": "7", "patch": PATCH}, "got -d and --patch: give one"),
        ({"dataset": "7", "plans_file": Path("x")}, "got -d and --plans: give one"),
        ({"patch": PATCH, "plans": "nnUNetPlans"}, "-p nnUNetPlans names plans of a data set, got --patch"),
        ({"patch": PATCH, "configuration": "2d"}, "got -c 2d: leave -c out"),
        ({"dataset": "7"}, "-d needs a configuration, got none"),
        ({"patch": (16,)}, "two or three numbers, got 16: use for example"),
        ({"patch": (16,) * 4}, "two or three numbers, got 16 16 16 16"),
        ({"patch": (16, 4, 16)}, "at least 8 voxels per axis, got 16 4 16"),
        ({"patch": (16, -16, 16)}, "at least 8 voxels per axis, got 16 -16 16"),
        ({"patch": PATCH, "channels": 0}, "--channels must be at least 1, got 0"),
        ({"patch": PATCH, "classes": 1}, "--classes must be at least 2, got 1"),
        ({"patch": PATCH, "batch": 0}, "--batch must be at least 1, got 0"),
        (
            {"dataset": "8", "configuration": "2d"},
            "got 8: there is Dataset007_Tiny: run nnUNetv2_plan_and_preprocess -d 8 first",
        ),
        ({"dataset": "Dataset007", "configuration": "2d"}, "got Dataset007: there is Dataset007_Tiny: run"),
        ({"dataset": "Tiny", "configuration": "2d"}, "a number or DatasetXXX_Name, got Tiny"),
        ({"dataset": "7", "configuration": "2d", "plans": "no"}, r"no\.json is missing"),
        ({"dataset": "7", "configuration": "3d"}, "configurations 3d_fullres, 2d, 3d_half, got 3d: choose"),
    ],
)
def test_mistake_is_refused_with_rule_value_and_cure(
    planned_dataset: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        Source(**options).setting()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"configurations": {"3d', r"plans\.json can\'t be read \("),
        ("[]", "must hold a JSON dict, got a list"),
        ("{}", "hold configurations, .* holds none"),
        ('{"configurations": []}', "hold configurations, .* holds none"),
        (
            '{"configurations": {"2d": {"architecture": {}}}}',
            r"2d: architecture must be a network with network_class_name, .* got \{\}: plan the data set again",
        ),
        ('{"configurations": {"2d": 1}}', r"configuration 2d: must be a dictionary, got 1: give files"),
    ],
)
def test_file_that_is_no_plans_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "plans.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as raised:
        Source(plans_file=file).setting()
    assert "\n" not in str(raised.value)


def test_binary_file_is_no_plans(tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    file.write_bytes(b"\x80\x00\xff")
    with pytest.raises(UsageError, match=r"plans\.json can't be read"):
        Source(plans_file=file).setting()


def test_two_data_sets_of_a_number_are_named(planned_dataset: Path) -> None:
    (planned_dataset.parent / "Dataset007_Other").mkdir()
    with pytest.raises(UsageError, match="got 7: there is Dataset007_Other, Dataset007_Tiny: give its full name"):
        Source(dataset="7", configuration="2d").setting()


def test_unset_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    with pytest.raises(UsageError, match="nnUNet_preprocessed, which is not set"):
        Source(dataset="7", configuration="2d").setting()


def test_missing_dataset_json_is_named(planned_dataset: Path) -> None:
    (planned_dataset / "dataset.json").unlink()
    with pytest.raises(UsageError, match=r"dataset\.json is missing"):
        Source(dataset="7", configuration="2d").setting()
