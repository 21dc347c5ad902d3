"""What every registered planner promises, and what ReversibleUNetPlanner plans."""

from __future__ import annotations

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_ext import registry
from nnunet_ext.memory.count import TrainingMemory
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.plans.memory_planner import MemoryPlanner
from nnunet_ext.plans.rivals import host_of, planned_by

PLANNERS = registry.names("planners")


def plan(planner: str, identifier: int, workspace: Path) -> dict[str, Any]:
    """Plan as `nnUNetv2_plan_experiment -pl planner` does; return the plans that were written."""
    name = plan_experiments([identifier], planner)
    (folder,) = (workspace / "preprocessed").glob(f"Dataset{identifier}_*")
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("planner", PLANNERS)
def test_keeps_the_six_arguments_of_nnunets_planner(planner: str) -> None:
    expected = list(signature(ExperimentPlanner.__init__).parameters)
    assert list(signature(registry.resolve("planners", planner).__init__).parameters) == expected


@pytest.mark.usefixtures("memory_by_voxels")
@pytest.mark.parametrize("planner", PLANNERS)
def test_plans_build_their_network_and_reuse_preprocessed_data(
    planner: str, dataset: Callable[[str], int], workspace: Path
) -> None:
    plans = plan(planner, dataset("labels"), workspace)
    assert plans["plans_name"] != "nnUNetPlans"
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["data_identifier"] == "nnUNetPlans_3d_fullres"
    architecture = configuration["architecture"]
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        2,
        3,
        deep_supervision=True,
    )
    assert network.compute_conv_feature_map_size(configuration["patch_size"]) > 0


@pytest.mark.usefixtures("memory_by_voxels")
@pytest.mark.parametrize("planner", PLANNERS)
def test_a_configuration_that_the_user_added_survives_planning_again(
    planner: str, dataset: Callable[[str], int], workspace: Path
) -> None:
    identifier = dataset("labels")
    name = plan(planner, identifier, workspace)["plans_name"]
    path = workspace / "preprocessed" / f"Dataset{identifier}_labels" / f"{name}.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 3}
    path.write_text(json.dumps(plans))
    assert plan(planner, identifier, workspace)["configurations"]["mine"]["batch_size"] == 3


def large_image_plan(planner_class: type[ExperimentPlanner], identifier: int, target: float) -> dict[str, Any]:
    """Plan a 3D configuration for images of 400^3 voxels of 1 mm."""
    planner = planner_class(identifier, gpu_memory_target_in_gb=target)
    return planner.get_plans_for_configuration([1.0] * 3, [400.0] * 3, "data", 400.0**3 * 100, {})


@pytest.mark.slow
def test_reversible_planner_spends_the_memory_on_a_larger_patch(dataset: Callable[[str], int]) -> None:
    identifier = dataset("labels")
    ours = large_image_plan(registry.resolve("planners", "ReversibleUNetPlanner"), identifier, 8)
    default = large_image_plan(ExperimentPlanner, identifier, 8)
    voxels = [float(a) * b * c for a, b, c in (ours["patch_size"], default["patch_size"])]
    assert voxels[0] >= 1.3 * voxels[1]


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("dim", [2, 3])
def test_where_the_patch_covers_the_image_the_batch_is_at_most_nnunets(
    dim: int, planner: str, dataset: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = TrainingMemory(parameters=0, gradients=0, optimizer=0, held=0, peak=GIB, workspace=0)
    monkeypatch.setattr(MemoryPlanner, "step_memory", lambda self, plan: memory)  # whatever the batch
    ours = registry.resolve("planners", planner)(dataset("labels"), 40)
    asked = ([1.0] * dim, [64.0] * dim, 64.0**dim * 10**6)
    plan = ours.get_plans_for_configuration(*asked[:2], "data", asked[2], {})
    assert plan["patch_size"] == [64] * dim
    assert plan["batch_size"] == planned_by(host_of(ours), asked)["batch_size"] > 2
    assert plan["memory"]["expected_GB"] < 0.9 * 40
    assert plan["memory"]["limit"] == "batch of nnU-Net"


@pytest.mark.usefixtures("memory_by_voxels")
def test_planning_for_another_target_says_that_plans_are_overwritten(
    dataset: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    identifier = dataset("labels")

    def said(target: float, name: str | None = None) -> str:
        registry.resolve("planners", "ReversibleUNetPlanner")(identifier, target, plans_name=name).plan_experiment()
        return capsys.readouterr().out

    said(6)
    assert "overwritten" not in said(6)
    assert "overwritten" not in said(8, "nnUNetReversiblePlans_8G")
    line = next(line for line in said(8).splitlines() if "overwritten" in line)
    assert line.startswith("nnUNetReversiblePlans.json was planned for 6 GB and is overwritten")
    assert "-gpu_memory_target 8 -overwrite_plans_name nnUNetReversiblePlans_8G" in line


def test_other_spacing_or_preprocessor_gets_its_own_data(dataset: Callable[[str], int]) -> None:
    planner = registry.resolve("planners", "ReversibleUNetPlanner")
    other = planner(dataset("labels"), overwrite_target_spacing=[2.0, 2.0, 2.0])
    assert other.generate_data_identifier("3d_fullres") == "nnUNetReversiblePlans_3d_fullres"
    other = planner(dataset("labels"), preprocessor_name="Mine")
    assert other.generate_data_identifier("3d_fullres") == "nnUNetReversiblePlans_3d_fullres"
    assert planner(dataset("labels")).generate_data_identifier("3d_lowres") == "nnUNetReversiblePlans_3d_lowres"


@pytest.mark.usefixtures("memory_by_voxels")
@pytest.mark.parametrize(
    ("planner", "host", "name", "trainer"),
    [
        ("CountedMemoryPlanner", ExperimentPlanner, "nnUNetCountedMemoryPlans", "nnUNetTrainer"),
        ("CountedMemoryResEncPlanner", nnUNetPlannerResEncM, "nnUNetCountedMemoryResEncPlans", "nnUNetTrainer"),
        (
            "ActivationCheckpointingPlanner",
            ExperimentPlanner,
            "nnUNetActivationCheckpointingPlans",
            "nnUNetTrainerActivationCheckpointing",
        ),
        (
            "ActivationCheckpointingResEncPlanner",
            nnUNetPlannerResEncM,
            "nnUNetActivationCheckpointingResEncPlans",
            "nnUNetTrainerActivationCheckpointing",
        ),
    ],
)
def test_planners_of_nnunets_own_network_change_nothing_but_patch_and_batch(
    planner: str, host: type[ExperimentPlanner], name: str, trainer: str, dataset: Callable[[str], int], workspace: Path
) -> None:
    plans = plan(planner, dataset("labels"), workspace)
    assert plans["plans_name"] == name
    ours = plans["configurations"]["3d_fullres"]
    assert ours["memory"]["trainer"] == trainer
    with torch.device("meta"):
        theirs = host(dataset("labels")).plan_experiment()["configurations"]["3d_fullres"]
    assert list(ours["patch_size"]) == list(theirs["patch_size"])  # which covers the image
    assert ours["architecture"] == json.loads(json.dumps(theirs["architecture"]))


@pytest.mark.usefixtures("memory_by_voxels")
def test_deep_planner_writes_its_depth_into_plans_of_its_own(dataset: Callable[[str], int], workspace: Path) -> None:
    plans = plan("ReversibleUNetDeepPlanner", dataset("labels"), workspace)
    assert plans["plans_name"] == "nnUNetReversibleDeepPlans"
    assert plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["blocks_per_stage"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planner", "gain"),
    [("ImplicitUNetPlanner", 2.0), ("InvertibleUNetPlanner", 1.5), ("PartiallyInvertibleUNetPlanner", 1.15)],
)
def test_other_planners_spend_the_memory_on_more_voxels_and_a_larger_patch(
    planner: str, gain: float, dataset: Callable[[str], int]
) -> None:
    identifier = dataset("labels")
    ours = large_image_plan(registry.resolve("planners", planner), identifier, 8)
    default = large_image_plan(ExperimentPlanner, identifier, 8)
    voxels = [float(a) * b * c for a, b, c in (ours["patch_size"], default["patch_size"])]
    assert voxels[0] >= 1.15 * voxels[1]
    assert voxels[0] * ours["batch_size"] >= gain * voxels[1] * default["batch_size"]
