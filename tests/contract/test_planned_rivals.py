"""What a planner prints and notes beside its choice: nnU-Net's own network in the same target."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from benchmarks.planners import FINGERPRINTS, write_dataset
from nnunet_ext import registry
from nnunet_ext.memory.count import TrainingMemory
from nnunet_ext.nnunet.setting import Setting

Plan = Callable[[str], dict[str, Any]]
COUNTED = {"CountedMemoryPlanner", "CountedMemoryResEncPlanner"}
OTHERS = [name for name in registry.names("planners") if name not in COUNTED]


@pytest.fixture
def number(workspace: Path, unused_number: Callable[[], int]) -> int:
    """A data set of large images: 2D and 3D are planned, no low resolution."""
    found = unused_number()
    write_dataset(workspace, found, replace(FINGERPRINTS["ct"], shape=(200, 200, 200)))
    return found


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], dict[str, float]]:
    """How often the step of each trainer is counted, and bytes per voxel that a trainer needs: by a formula."""
    made: Counter[str] = Counter()
    needs: dict[str, float] = {}

    def training_memory(setting: Setting, trainer: str) -> TrainingMemory:
        made[trainer] += 1
        voxels = setting.batch_size * prod(setting.patch_size)
        peak = round(needs.get(trainer, 1300 if len(setting.patch_size) == 3 else 1600) * voxels)
        return TrainingMemory(parameters=0, gradients=0, optimizer=0, held=peak, peak=peak, workspace=0)

    monkeypatch.setattr("nnunet_ext.plans.memory_planner.training_memory", training_memory)
    monkeypatch.setattr("nnunet_ext.plans.me_cascade_planner.training_memory", training_memory)
    return made, needs


@pytest.fixture
def plan(number: int, workspace: Path) -> Plan:
    """Plan for 8 GB; give the configurations as they were written."""

    def planned(planner: str) -> dict[str, Any]:
        found = registry.resolve("planners", planner)(number, 8)
        found.plan_experiment()
        path = workspace / "preprocessed" / found.dataset_name / f"{found.plans_identifier}.json"
        configurations: dict[str, Any] = json.loads(path.read_text())["configurations"]
        return configurations

    return planned


def voxels(entry: dict[str, Any]) -> int:
    return entry["batch_size"] * prod(entry["patch_size"])


def test_a_method_that_frees_half_is_told_from_filling(
    plan: Plan, counts: tuple[Counter[str], dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    counts[1]["nnUNetTrainerFasterFusionBN"] = 650
    entry = plan("FasterFusionUNetPlanner")["3d_fullres"]
    compared = entry["memory"]["compared"]
    default, filled = voxels(compared["default"]), voxels(compared["filled"])
    assert default < filled < voxels(entry)
    assert compared["voxels_by_filling"] == pytest.approx(filled / default, abs=5e-4)
    assert compared["voxels_by_method"] == pytest.approx(voxels(entry) / filled, abs=5e-4)
    said = (
        f"{voxels(entry) / default:.2f}x the voxels of default: {filled / default:.2f}x is filling the target, "
        f"{voxels(entry) / filled:.2f}x the method."
    )
    printed = capsys.readouterr().out
    assert said in printed
    patch = "x".join(map(str, compared["filled"]["patch_size"]))
    assert f"    default filled: patch {patch}, batch {compared['filled']['batch_size']}: " in printed
    assert 0.9 * 8 <= compared["filled"]["expected_GB"] <= 8


@pytest.mark.usefixtures("counts")
@pytest.mark.parametrize("planner", ["FasterFusionUNetPlanner", "ReversibleUNetPlanner"])
def test_a_method_that_needs_as_much_does_not_look_as_if_it_freed_memory(
    planner: str, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    configurations = plan(planner)
    printed = capsys.readouterr().out
    assert printed.count("1.00x the method, which frees no memory.") == 2
    for entry in configurations.values():
        ours = {key: entry[key] for key in ("patch_size", "batch_size")}
        assert {**ours, "expected_GB": entry["memory"]["expected_GB"]} == entry["memory"]["compared"]["filled"]


@pytest.mark.usefixtures("counts")
@pytest.mark.parametrize("planner", sorted(COUNTED))
def test_nnunets_own_network_by_counted_memory_is_only_filling(
    planner: str, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(planner)
    printed = capsys.readouterr().out
    name = "default ResEnc M" if "ResEnc" in planner else "default"
    # In 2D the patch covers the image, and nothing is left to fill.
    assert len(re.findall(rf"the voxels of {name}(?:, all of it (?:filling|keeping to) the target)?\.", printed)) == 2
    assert "the method" not in printed
    assert " filled: " not in printed


@pytest.mark.parametrize("planner", OTHERS)
def test_every_planner_names_the_filled_network_of_its_own_kind(
    planner: str, plan: Plan, counts: tuple[Counter[str], dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    configurations = plan(planner)
    noted = [entry["memory"]["compared"] for entry in configurations.values() if "memory" in entry]
    name = "default ResEnc M" if "ResEnc" in planner else "default"
    printed = capsys.readouterr().out
    assert printed.count(f"    {name} filled: patch ") == len(noted) >= 2
    # In 3D default's, which the search begins with, and the filled one's; in 2D these are the same, where they fit.
    assert counts[0]["nnUNetTrainer"] == 2 + 1


def test_a_target_that_only_the_method_fits_is_said(
    plan: Plan, counts: tuple[Counter[str], dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    counts[1]["nnUNetTrainer"] = 10**9
    entry = plan("ReversibleUNetPlanner")["3d_fullres"]
    assert entry["memory"]["compared"]["filled"] is None
    printed = capsys.readouterr().out
    assert "    default filled: no patch fits the target\n" in printed
    assert "without it no patch fits the target." in printed
