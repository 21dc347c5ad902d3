"""What the planners of meU-net write, for images of many shapes."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, prod
from typing import Any

import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_ext.architectures.expanded.patch import divisors
from nnunet_ext.plans.me_res_enc_unet_planner import MeResEncUNetPlanner
from nnunet_ext.plans.me_reversible_unet_planner import MeReversibleUNetPlanner
from nnunet_ext.plans.me_unet_planner import MeUNetPlanner
from nnunet_ext.trainers.me_unet import plan_standard_patch

IMAGES: dict[str, tuple[list[float], list[float]]] = {  # spacing, median shape
    "isotropic": ([1.0, 1.0, 1.0], [400.0, 400.0, 400.0]),
    "thick slices": ([5.0, 0.8, 0.8], [40.0, 512.0, 512.0]),
    "small": ([1.0, 1.0, 1.0], [36.0, 50.0, 35.0]),
    "rod": ([1.0, 1.0, 1.0], [1072.0, 140.0, 140.0]),
    "2d": ([1.0, 1.0], [1000.0, 700.0]),
}
N_CASES = 300


def plan(planner_class: type[ExperimentPlanner], identifier: int, image: str) -> dict[str, Any]:
    spacing, shape = IMAGES[image]
    planner = planner_class(identifier, gpu_memory_target_in_gb=8)
    with torch.device("meta"):  # for nnU-Net's planner sizes are enough
        return planner.get_plans_for_configuration(spacing, shape, "data", prod(shape) * N_CASES, {})


@pytest.mark.usefixtures("memory_by_voxels")
@pytest.mark.parametrize("planner", [MeUNetPlanner, MeResEncUNetPlanner, MeReversibleUNetPlanner])
@pytest.mark.parametrize("image", IMAGES)
def test_patch_surrounds_the_standard_patch_and_stays_in_the_image(
    planner: type[ExperimentPlanner], image: str, dataset: Callable[[str], int]
) -> None:
    ours = plan(planner, dataset("labels"), image)
    patch, noted = ours["patch_size"], ours["me_unet"]
    standard = noted["standard_patch_size"]
    divisor = divisors(ours["architecture"]["arch_kwargs"]["strides"], len(patch))
    for size, p, k, d, voxels in zip(patch, standard, noted["k"], divisor, IMAGES[image][1], strict=True):
        assert size % d == 0
        assert p % d == 0
        assert size == k * p
        assert size <= max(p, ceil(voxels / d) * d)
        assert (size > p) == (voxels > p and d <= 0.5 * p)
    # The trainer reads the same from the plans.
    assert plan_standard_patch(ConfigurationManager(ours), 99.0) == tuple(standard)
    if planner is not MeResEncUNetPlanner:  # which may cover the whole data set
        covered = round(prod(IMAGES[image][1]) * N_CASES * 0.05 / prod(patch))
        assert ours["batch_size"] <= max(2, covered)


@pytest.mark.usefixtures("memory_by_voxels")
def test_network_is_nnunets_own(dataset: Callable[[str], int]) -> None:
    ours, host = (plan(p, dataset("labels"), "small") for p in (MeUNetPlanner, ExperimentPlanner))
    assert ours["me_unet"]["standard_patch_size"] == list(host["patch_size"]) == [40, 56, 40]
    assert ours["architecture"] == host["architecture"]


@pytest.mark.usefixtures("memory_by_voxels")
def test_a_large_image_gets_half_as_much_more_context(dataset: Callable[[str], int]) -> None:
    k = plan(MeUNetPlanner, dataset("labels"), "isotropic")["me_unet"]["k"]
    assert k == pytest.approx([1.5, 1.5, 1.5], rel=0.15)  # rounded to what the strides divide


@pytest.mark.slow
def test_reversible_planner_starts_from_the_larger_patch_of_its_host(dataset: Callable[[str], int]) -> None:
    ours, default = (plan(p, dataset("labels"), "isotropic") for p in (MeReversibleUNetPlanner, ExperimentPlanner))
    assert prod(ours["me_unet"]["standard_patch_size"]) >= prod(default["patch_size"])
    assert prod(ours["patch_size"]) > 1.5**3 * prod(default["patch_size"])


@pytest.mark.usefixtures("memory_by_voxels")
def test_a_k_whose_expanded_pass_is_the_larger_one_shrinks_the_standard_patch(dataset: Callable[[str], int]) -> None:
    small, large = (plan(type("Wide", (MeUNetPlanner,), {"k": k}), dataset("labels"), "isotropic") for k in (1.25, 2.0))
    volumes = [prod(p["me_unet"]["standard_patch_size"]) for p in (small, large)]
    assert volumes[1] < 0.8 * volumes[0]


def test_a_k_below_one_is_refused(dataset: Callable[[str], int]) -> None:
    planner = type("Narrow", (MeUNetPlanner,), {"k": 0.8})
    with pytest.raises(ValueError, match=r"must be at least 1, got 0\.8"):
        plan(planner, dataset("labels"), "isotropic")
