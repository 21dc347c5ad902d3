"""What the planner of meU-net's cascade writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from benchmarks.planners import FINGERPRINTS, write_dataset
from nnunet_ext.memory.count import TrainingMemory
from nnunet_ext.plans.me_cascade_planner import MeCascadePlanner
from nnunet_ext.trainers.me_unet import plan_standard_patch
from nnunet_ext.trainers.nnUNetTrainerMeCascade import nnUNetTrainerMeCascade

PLANNED = [
    ("MeCascadePlanner", "labels"),
    ("MeCascadePlanner", "regions"),
    ("MeCascadePlanner", "ignore"),
    ("MeCascadeResEncPlanner", "labels"),
]


@pytest.fixture(params=PLANNED, ids="-".join)
def plans(
    request: pytest.FixtureRequest, dataset: Callable[[str], int], workspace: Path, memory_by_voxels: None
) -> Any:
    """The plans that `nnUNetv2_plan_experiment -pl PLANNER` writes."""
    planner, labels = request.param
    return PlansManager(written(planner, dataset(labels), workspace))


@cache
def written(planner: str, identifier: int, workspace: Path) -> dict[str, Any]:
    name = plan_experiments([identifier], planner)
    (folder,) = (workspace / "preprocessed").glob(f"Dataset{identifier}_*")
    plans: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return plans


@pytest.mark.parametrize("dim", ["2d", "3d"])
def test_the_stages_know_each_other_and_share_their_data(dim: str, plans: Any) -> None:
    base = plans.get_configuration("2d" if dim == "2d" else "3d_fullres")
    context, post = (plans.get_configuration(f"{dim}_{name}") for name in ("me_context", "post_concat"))
    assert context.next_stage_names == [f"{dim}_post_concat"]
    assert context.previous_stage_name is None
    assert post.previous_stage_name == f"{dim}_me_context"
    assert context.data_identifier == post.data_identifier == base.data_identifier
    assert context.spacing == post.spacing == base.spacing
    assert post.patch_size == base.patch_size == context.configuration["me_unet"]["standard_patch_size"]
    assert plan_standard_patch(context, 99.0) == tuple(base.patch_size)
    assert "me_unet" not in base.configuration
    assert "me_unet" not in post.configuration


@pytest.mark.parametrize("dim", ["2d", "3d"])
def test_plans_alone_build_the_networks_that_the_trainer_builds(dim: str, plans: Any) -> None:
    for name, channels in ((f"{dim}_me_context", 2), (f"{dim}_post_concat", 4)):
        configuration = plans.get_configuration(name)
        planned = get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            channels,
            3,
            deep_supervision=True,
        )
        built = nnUNetTrainerMeCascade.build_network_architecture(plans, configuration, channels, 3)
        built.load_state_dict(planned.state_dict(), strict=True)
        if name.endswith("context"):
            (labels,) = {bool(planned.regions), bool(configuration.network_arch_init_kwargs["regions"])}
            assert labels == (plans.dataset_name == "Dataset902_regions")


def test_the_residual_planner_plans_residual_networks(plans: Any) -> None:
    residual = plans.plans_name == "nnUNetMeCascadeResEncUNetMPlans"
    for name in ("3d_fullres", "3d_me_context", "3d_post_concat"):
        options = plans.get_configuration(name).network_arch_init_kwargs
        assert ("n_blocks_per_stage" in options, "n_conv_per_stage" in options) == (residual, not residual)


@pytest.mark.slow
def test_a_large_image_gets_its_context_and_the_memory_of_the_larger_stage(dataset: Callable[[str], int]) -> None:
    planner = MeCascadePlanner(dataset("labels"), gpu_memory_target_in_gb=8)
    shape = [600.0] * 3
    with torch.device("meta"):
        planned = planner.get_plans_for_configuration([1.0] * 3, shape, "data", prod(shape) * 300, {})
    stages = MeCascadePlanner.with_stages({"3d_fullres": planned}, planner.dataset_json)
    standard = stages["3d_fullres"]["patch_size"]
    assert stages["3d_me_context"]["me_unet"]["k"] == pytest.approx([1.75] * 3, rel=0.15)
    assert stages["3d_me_context"]["patch_size"] == planned["patch_size"]
    assert prod(standard) <= 128**3  # the expanded pass of k = 1.75 is the larger one, so P shrinks
    assert "patch_size" not in stages["3d_post_concat"]


def test_plans_given_to_it_are_not_changed(dataset: Callable[[str], int]) -> None:
    configuration = {
        "patch_size": [28, 28],
        "me_unet": {"k": [1.75, 1.75], "standard_patch_size": [16, 16]},
        "architecture": {"network_class_name": "x", "arch_kwargs": {}},
    }
    before = json.dumps(configuration)
    MeCascadePlanner.with_stages({"2d": configuration}, {"labels": {"background": 0, "a": 1}})
    assert json.dumps(configuration) == before


def test_too_shallow_a_network_gets_no_cascade_and_says_so() -> None:
    with pytest.warns(UserWarning, match="at least 3 stages, 2d has fewer: it gets no cascade"):
        found = MeCascadePlanner.with_stages({"2d": {"patch_size": [8, 8]}}, {"labels": {"background": 0}})
    assert found == {"2d": {"patch_size": [8, 8]}}


@pytest.mark.usefixtures("memory_by_voxels")
def test_large_images_that_get_nnunets_own_cascade_too_are_planned(
    workspace: Path, unused_number: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = TrainingMemory(parameters=0, gradients=0, optimizer=0, held=0, peak=1, workspace=0)
    monkeypatch.setattr("nnunet_ext.plans.me_cascade_planner.training_memory", lambda *_: memory)
    number = unused_number()
    write_dataset(workspace, number, FINGERPRINTS["ct"])
    planner = MeCascadePlanner(number, 8)
    planner.plan_experiment()
    path = workspace / "preprocessed" / planner.dataset_name / f"{planner.plans_identifier}.json"
    plans = PlansManager(json.loads(path.read_text()))
    cascade, base = (plans.get_configuration(name) for name in ("3d_cascade_fullres", "3d_fullres"))
    assert cascade.previous_stage_name == "3d_lowres"
    assert (cascade.patch_size, cascade.batch_size) == (base.patch_size, base.batch_size)
    assert {"3d_me_context", "3d_post_concat"} < set(plans.available_configurations)
