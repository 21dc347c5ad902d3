"""What a planner chose and why, and what default nnU-Net would have chosen for the same GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_ext import registry
from nnunet_ext.memory.count import TrainingMemory, training_memory
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.nnunet.plans import configuration
from nnunet_ext.plans.memory_search import FILLED, Choice

if TYPE_CHECKING:
    from nnunet_ext.plans.memory_planner import MemoryPlanner


def figures(memory: TrainingMemory) -> dict[str, Any]:
    """Figures of a memory for the plans; 1 GB is 2**30 bytes."""
    parts = {name: round(size / GIB, 3) for name, size in memory.as_dict().items()}
    return {"expected_GB": round(memory.expected / GIB, 3), "parts_GB": parts}


def memory_entry(choice: Choice, target: int, trainer: str) -> dict[str, Any]:
    """What the plans note about a choice."""
    return {
        "target_GB": round(target / GIB, 3),
        "trainer": trainer,
        "limit": _limit(choice, target),
        **figures(choice.memory),
    }


def _limit(choice: Choice, target: int) -> str:
    """What keeps patch and batch from being larger."""
    if choice.memory.expected >= FILLED * target:
        return "memory"
    if not choice.candidate.covers_image:
        return "steps between patches"
    return "data set" if choice.batch >= choice.candidate.most else "image"


_REASONS = {
    "memory": "the next larger one does not fit",
    "image": "the patch covers a typical image, and one more in the batch does not fit",
    "data set": "the patch covers a typical image, and the batch at most 5 % of the data set",
    "steps between patches": "no patch that the strides divide fills the target better",
}


def report(planner: MemoryPlanner, plans: Mapping[str, Any], asked: Mapping[str, tuple[Any, Any, float]]) -> str:
    """A text with two lines per configuration."""
    target = planner.UNet_vram_target_GB
    lines = [f"\nPatch and batch for {target:g} GB, counted for {planner.trainer}; and default nnU-Net's:"]
    for name, plan in plans["configurations"].items():
        if "memory" not in plan:
            continue
        memory = plan["memory"]
        plan = configuration(plans, name)
        lines.append(
            f"  {name}: {_sizes(plan)}: {memory['expected_GB']:.2f} GB expected; limit is the {memory['limit']}: "
            f"{_REASONS[memory['limit']]}"
        )
        if plan.get("data_identifier") in asked:
            default = default_choice(planner, *asked[plan["data_identifier"]])
            expected = training_memory(planner.setting_of(default), registry.CORE_TRAINER).expected
            lines.append(f"    default: {_sizes(default)}: {expected / GIB:.2f} GB expected")
    lines.append("  1 GB is 2**30 bytes; expected is the step's peak with an allowance for CUDA.\n")
    return "\n".join(lines)


def default_choice(planner: MemoryPlanner, spacing: Any, median_shape: Any, n_voxels: float) -> dict[str, Any]:
    """The configuration that nnU-Net's default planner makes of the same data for the same target."""
    default = ExperimentPlanner(planner.dataset_name, planner.UNet_vram_target_GB)
    with torch.device("meta"):  # it builds networks only for their sizes
        plan: dict[str, Any] = default.get_plans_for_configuration(spacing, median_shape, "default", n_voxels, {})
    return {**plan, "patch_size": [int(n) for n in plan["patch_size"]]}


def _sizes(plan: Mapping[str, Any]) -> str:
    sizes = f"patch {'x'.join(map(str, plan['patch_size']))}, batch {plan['batch_size']}"
    noted = plan.get("me_unet")
    return f"{sizes} (standard patch {'x'.join(map(str, noted['standard_patch_size']))})" if noted else sizes
