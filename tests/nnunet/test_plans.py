"""Files of nnU-Net that it did not write: every command says in one line what is wrong, and none hangs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_ext import cli
from nnunet_ext.comparison.run_folders import read_run
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.datasets import read_dataset
from nnunet_ext.nnunet.plans import configuration, is_plain_name, read_plans
from tests.comparison.conftest import CONFIGURATION, DATASET
from tests.nnunet.test_trust import commands, write_model

Spoil = Callable[[Path], Any]
COMMANDS = ("estimate", "benchmark", "compare", "deploy", "cascade-predict")
CURE = "copy it again"
NAN = float("nan")


def replaced(make: Spoil) -> Spoil:
    def spoil(path: Path) -> None:
        path.unlink()
        make(path)

    return spoil


def holding(content: bytes) -> Spoil:
    return replaced(lambda path: path.write_bytes(content))


BROKEN: dict[str, Spoil] = {
    "missing": lambda path: path.unlink(),
    "empty": holding(b""),
    "cut off": holding(b'{"configurations": {"3d'),
    "other type": holding(b"[]"),
    "nested": holding(b"[" * 100_000),
    "binary": holding(b"\x80\xff"),
    "pipe": replaced(os.mkfifo),
    "folder": replaced(lambda path: path.mkdir()),
    "links in a circle": replaced(lambda path: path.symlink_to(path.name)),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("read", [read_plans, read_dataset])
def test_what_is_no_whole_file_is_named(read: Callable[[Path, str], Any], how: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.touch()
    BROKEN[how](path)
    with pytest.raises(UsageError, match=rf"x\.json.*: {CURE}\.$"):
        read(path, CURE)


def test_a_json_file_larger_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    with path.open("wb") as stream:
        stream.truncate(2**33)
    with pytest.raises(UsageError, match="8589934592 bytes, more than any"):
        read_plans(path, CURE)


CIRCLE = {"3d_fullres": {"inherits_from": "other"}, "other": {"inherits_from": "3d_fullres"}}
ARCHITECTURE = CONFIGURATION["architecture"]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "circle": (CIRCLE, "must hold 3d_fullres as nnU-Net writes it, .*Circular"),
    "of itself": ({"3d_fullres": {"inherits_from": "3d_fullres"}}, "Circular"),
    "orphan": ({"3d_fullres": {"inherits_from": "gone"}}, "gone does not exist"),
    "no name": ({"2d": {}}, "have the configurations 2d, got 3d_fullres: choose one"),
    **{
        f"{key} {place}": ({"3d_fullres": {**CONFIGURATION, key: value}}, f"3d_fullres: {key} must be .*, got")
        for place, (key, value) in enumerate(
            (
                ("patch_size", "16"),
                ("patch_size", [NAN] * 3),
                ("patch_size", [16]),
                ("patch_size", [-1, 16, 16]),
                ("batch_size", "2"),
                ("batch_size", NAN),
                ("spacing", [float("inf")]),
                ("architecture", []),
                ("architecture", {**ARCHITECTURE, "_kw_requires_import": ["nothing"]}),
                ("architecture", {**ARCHITECTURE, "_kw_requires_import": [["conv_op"]]}),
                ("architecture", {**ARCHITECTURE, "arch_kwargs": None}),
            )
        )
    },
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_values_of_plans_are_named(what: str) -> None:
    configurations, message = WRONG[what]
    with pytest.raises(UsageError, match=message) as raised:
        configuration({"configurations": configurations}, "3d_fullres")
    assert "\n" not in str(raised.value)


def test_plans_are_resolved_as_nnunet_does_and_stay_as_they_are() -> None:
    plans = {"configurations": {"a": CONFIGURATION, "b": {"inherits_from": "a", "batch_size": 7}}}
    before = deepcopy(plans)
    assert configuration(plans, "b") == {**CONFIGURATION, "inherits_from": "a", "batch_size": 7}
    assert plans == before


def test_network_of_old_plans_is_resolved() -> None:
    old = {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 8,
        "n_conv_per_stage_encoder": [2, 2],
        "n_conv_per_stage_decoder": [2],
        "num_pool_per_axis": [1, 1, 1],
        "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2]],
        "conv_kernel_sizes": [[3, 3, 3], [3, 3, 3]],
        "patch_size": [16, 16, 16],
        "batch_size": 2,
    }
    found = configuration({"configurations": {"3d_fullres": old}}, "3d_fullres")
    assert found["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8]


@pytest.mark.parametrize("key", ["dataset_name", "plans_name"])
@pytest.mark.parametrize("value", ["../up", "/etc", "a\\b", "..", "", 3, None, "a\nb"])
def test_names_that_are_paths_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    assert not is_plain_name(value)
    path = tmp_path / "plans.json"
    path.write_text(json.dumps({key: value, "configurations": {"2d": {}}}))
    with pytest.raises(UsageError, match=f"{key}: must be a name and no path"):
        read_plans(path, CURE)


@pytest.mark.parametrize("link", ["previous_stage", "next_stage", "inherits_from"])
def test_links_that_are_paths_are_refused(link: str, tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    path.write_text(json.dumps({"configurations": {"2d": {link: "../other"}}}))
    with pytest.raises(UsageError, match=f"2d, {link}: must be a name and no path"):
        read_plans(path, CURE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("labels", [1]),
        ("labels", {}),
        ("labels", {"a": "x"}),
        ("labels", {"a": None}),
        ("labels", {"a": -1}),
        ("labels", {"a": [[1]]}),
        ("labels", {"a": NAN}),
        ("file_ending", 3),
        ("file_ending", ""),
        ("file_ending", "/../x"),
        ("file_ending", "*"),
        ("channel_names", ["CT"]),
        ("channel_names", {"0": None}),
        ("regions_class_order", "12"),
        ("file_ending", None),
        ("overwrite_image_reader_writer", None),
        ("overwrite_image_reader_writer", 3),
        ("overwrite_image_reader_writer", ["NibabelIO"]),
        ("overwrite_image_reader_writer", "np"),
        ("overwrite_image_reader_writer", "os.system"),
        ("overwrite_image_reader_writer", "BaseReaderWriter"),
        ("dataset", None),
        ("dataset", []),
        ("dataset", {"a": 3}),
        ("dataset", {"a": {"images": ["a_0000.nii.gz"]}}),
        ("dataset", {"a": {"images": "a_0000.nii.gz", "label": "a.nii.gz"}}),
        ("dataset", {"a": {"images": [], "label": "a.nii.gz"}}),
        ("dataset", {"../a": {"images": ["a_0000.nii.gz"], "label": "a.nii.gz"}}),
    ],
)
def test_wrong_values_of_dataset_json_are_named(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({**DATASET, key: value}))
    with pytest.raises(UsageError, match=f"dataset.json: {key} must be .*: {CURE}"):
        read_dataset(path, CURE, needed=())


def changed(**changes: Any) -> Spoil:
    """Change values of a JSON file."""
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def in_checkpoint(**changes: Any) -> Spoil:
    return lambda path: torch.save({**torch.load(path, weights_only=False), **changes}, path)


def without_strides(path: Path) -> None:
    plans = json.loads(path.read_text())
    for values in plans["configurations"].values():
        del values["architecture"]["arch_kwargs"]["strides"]
    path.write_text(json.dumps(plans))


CASES: list[tuple[str, Spoil, tuple[str, ...]]] = [
    ("plans.json", BROKEN["pipe"], COMMANDS),
    ("plans.json", BROKEN["links in a circle"], COMMANDS),
    ("plans.json", without_strides, ("estimate", "benchmark", "deploy")),
    ("plans.json", changed(configurations=[]), COMMANDS),
    ("dataset.json", BROKEN["pipe"], COMMANDS),
    ("dataset.json", changed(labels={"a": 1}), ("estimate", "benchmark", "deploy", "cascade-predict")),
    ("dataset.json", changed(file_ending="/../x"), COMMANDS),
    ("checkpoint_final.pth", BROKEN["pipe"], ("deploy", "cascade-predict")),
    ("checkpoint_final.pth", BROKEN["binary"], ("deploy", "cascade-predict")),
    ("checkpoint_final.pth", in_checkpoint(init_args="3d_fullres"), ("deploy", "cascade-predict")),
    ("checkpoint_final.pth", in_checkpoint(network_weights=[1]), ("deploy", "cascade-predict")),
    ("checkpoint_final.pth", in_checkpoint(init_args={"configuration": "gone"}), ("deploy", "cascade-predict")),
    ("summary.json", BROKEN["pipe"], ("compare",)),
    ("summary.json", BROKEN["nested"], ("compare",)),
]


@pytest.mark.parametrize(
    ("name", "spoil", "command"), [(name, spoil, command) for name, spoil, run in CASES for command in run]
)
def test_every_command_ends_with_one_line(
    name: str,
    spoil: Spoil,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    arguments = commands(tmp_path, CONFIGURATION)[command]
    for path in tmp_path.rglob(name):
        spoil(path)
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len([line for line in printed.err.splitlines() if line.startswith(f"nnunet-ext {command}: ")]) == 1


def test_a_run_reached_by_links_in_a_circle_is_none(tmp_path: Path) -> None:
    link = tmp_path / "nnUNetTrainer__nnUNetPlans__2d"
    link.symlink_to(link.name)
    with pytest.raises(UsageError, match="must be an existing folder"):
        read_run(link)


def test_a_comparison_goes_on_without_plans_that_inherit_in_a_circle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("raw", "preprocessed"):
        monkeypatch.delenv(f"nnUNet_{name}", raising=False)
    model = write_model(tmp_path, CIRCLE, "3d_fullres", {})
    assert cli.main(["compare", "-m", str(model), "-np", "1", "-o", str(tmp_path / "out")]) == 0
    error = capsys.readouterr().err
    assert "size and memory are missing (the plans nnUNetPlans must hold 3d_fullres" in error


@pytest.mark.parametrize("name", ["NibabelIO", "None"])
def test_readers_of_nnunet_are_admitted(name: str, tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({**DATASET, "overwrite_image_reader_writer": name}))
    assert read_dataset(path, CURE)["overwrite_image_reader_writer"] == name
