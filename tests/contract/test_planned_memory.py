"""Planned memory is counted memory, fills the target, and is said: for data sets of fingerprints alone."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.planners import (
    COUNTED,
    DEFAULT,
    FINGERPRINTS,
    NAMES,
    TABLE_BEGIN,
    TABLE_END,
    default_row,
    grid_row,
    presets,
    size,
    write_dataset,
)
from nnunet_ext import registry
from nnunet_ext.memory.count import training_memory
from nnunet_ext.memory.network import measure_step
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.nnunet.setting import Setting

CASES = [
    ("CountedMemoryPlanner", "ct", 8),
    ("ReversibleUNetPlanner", "tiny", 4),
    ("FasterFusionUNetPlanner", "2d", 80),
    ("MeCascadePlanner", "ct", 8),
    ("ImplicitUNetPlanner", "microct", 4),
]
SLOW = [
    pytest.param(planner, key, target, marks=pytest.mark.slow)
    for planner in registry.names("planners")
    for key in FINGERPRINTS
    for target in (4, 8, 11, 24, 80)
    if (planner, key, target) not in CASES
]


@pytest.fixture(scope="module")
def numbers(unused_number: Callable[[], int]) -> dict[tuple[str, ...], int]:
    return defaultdict(unused_number)


@pytest.fixture
def number(workspace: Path, numbers: dict[tuple[str, ...], int]) -> Callable[..., int]:
    """Write the data set of a fingerprint and give its number: ``number("ct", classes=30)``."""

    def write(key: str, **changes: Any) -> int:
        found = numbers[(key, *changes)]
        write_dataset(workspace, found, replace(FINGERPRINTS[key], **changes))
        return found

    return write


@pytest.mark.parametrize(("planner", "key", "target"), [*CASES, *SLOW])
def test_planned_step_fits_the_target_and_fills_it(
    planner: str, key: str, target: float, number: Callable[[str], int]
) -> None:
    found = grid_row(planner, key, number(key), target)
    assert 0 < found.counted <= target
    assert found.expected == pytest.approx(found.counted, rel=0.05)
    if found.counted < 0.9 * target:
        inner = found.standard_patch or found.patch
        assert all(n >= size for n, size in zip(inner, FINGERPRINTS[key].shape, strict=True))
        assert found.limit in ("image", "data set", "batch of nnU-Net")


def plan_with(planner: str, number: int, target: float, **arguments: Any) -> dict[str, Any]:
    found = registry.resolve("planners", planner)(number, target, **arguments)
    plans: dict[str, Any] = found.plan_experiment()
    return plans


@pytest.mark.usefixtures("memory_by_voxels")
def test_a_second_stage_that_does_not_fit_gets_fewer_voxels(
    number: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    plans = plan_with("FasterFusionUNetPlanner", number("ct", classes=30, shape=(500, 400, 400)), 8)
    full, cascade = (plans["configurations"][name] for name in ("3d_fullres", "3d_cascade_fullres"))
    voxels = [math.prod(entry["patch_size"]) * entry["batch_size"] for entry in (full, cascade)]
    assert voxels[1] < voxels[0]
    printed = capsys.readouterr().out
    assert f"3d_fullres: patch {'x'.join(map(str, full['patch_size']))}, batch {full['batch_size']}" in printed
    assert printed.count("    default: patch ") == 4


@pytest.mark.slow
def test_planning_prints_what_the_plans_hold_and_default_beside_it(
    workspace: Path, number: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    # Large images of 30 classes: a low resolution, and a cascade whose second stage gets 29 channels more.
    dataset = number("ct", classes=30, shape=(500, 400, 400))
    plans = plan_with("FasterFusionUNetPlanner", dataset, 8)
    printed = capsys.readouterr().out
    configurations = plans["configurations"]
    assert {"2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"} == set(configurations)
    for name in ("2d", "3d_fullres", "3d_lowres"):
        entry = configurations[name]
        patch = "x".join(map(str, entry["patch_size"]))
        expected = entry["memory"]["expected_GB"]
        assert f"{name}: patch {patch}, batch {entry['batch_size']}: {expected:.2f} GB expected" in printed
        assert entry["memory"]["limit"] == "memory"
    assert printed.count("    default: patch ") == 3
    content = json.loads((workspace / "raw" / f"Dataset{dataset}_planned" / "dataset.json").read_text())
    for name, entry in configurations.items():
        total = (
            training_memory(
                Setting(plans=plans, dataset=content, configuration=name), "nnUNetTrainerFasterFusionBN"
            ).expected
            / GIB
        )
        assert 7.2 <= total <= 8
        if "memory" in entry:
            assert entry["memory"]["expected_GB"] == pytest.approx(total, rel=0.05)


def test_the_benchmarks_count_of_the_network_agrees(number: Callable[[str], int]) -> None:
    planner = registry.resolve("planners", "ReversibleUNetPlanner")(number("ct"), 8)
    plan = planner.get_plans_for_configuration([1.0] * 3, [400.0] * 3, "data", 400.0**3 * 100, {})
    setting = planner.setting_of(plan)
    step = measure_step(setting.builder(planner.trainer), 1, plan["patch_size"], plan["batch_size"], torch.bfloat16)
    parts = plan["memory"]["parts_GB"]
    assert (step.peak + 2 * step.parameters) / GIB == pytest.approx(parts["peak"], rel=0.08)


@pytest.mark.parametrize("target", [0, -1, math.nan])
def test_a_target_that_is_none_is_refused(target: float, number: Callable[[str], int]) -> None:
    with pytest.raises(ValueError, match="must be a positive number of GB"):
        registry.resolve("planners", "ReversibleUNetPlanner")(number("tiny"), target)


def test_a_target_too_small_for_any_patch_is_refused(number: Callable[[str], int]) -> None:
    with pytest.raises(ValueError, match=r"no patch that trains in 0\.5 GB: the smallest, .* enlarge"):
        plan_with("FasterFusionUNetPlanner", number("tiny"), 0.5)


def test_a_missing_fingerprint_is_said(workspace: Path, number: Callable[[str], int]) -> None:
    dataset = number("tiny")
    (workspace / "preprocessed" / f"Dataset{dataset}_planned" / "dataset_fingerprint.json").unlink()
    with pytest.raises(RuntimeError, match="Fingerprint missing"):
        registry.resolve("planners", "ReversibleUNetPlanner")(dataset, 8)


def test_table_of_the_documentation_is_the_commands(number: Callable[[str], int]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "plan-memory.md").read_text(encoding="utf-8")
    table = page[page.index(TABLE_BEGIN) : page.index(TABLE_END)]
    default, filled = default_row(DEFAULT, "ct", number("ct"), 8), grid_row(COUNTED[DEFAULT], "ct", number("ct"), 8)
    for row in (default, filled, grid_row("FasterFusionUNetPlanner", "ct", number("ct"), 8)):
        name = NAMES.get(row.planner, f"`{row.planner}`")
        (line,) = (line for line in table.splitlines() if line.startswith(f"| {name} |"))
        assert f"| {size(row)}: {row.counted:.1f} GB, {row.voxels / filled.voxels:.2f}x |" in line


@pytest.mark.slow
def test_table_of_nnunets_presets_is_the_commands(number: Callable[[str], int]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "plan-memory.md").read_text(encoding="utf-8")
    assert presets("ct", number("ct")).strip() in page
