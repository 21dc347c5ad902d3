"""Planner of the Implicit U-Net."""

from __future__ import annotations

from nnunet_ext.architectures.implicit_unet import ImplicitUNet
from nnunet_ext.plans.memory_planner import MemoryPlanner


class ImplicitUNetPlanner(MemoryPlanner):
    """Spends the memory that `ImplicitUNet` frees on a larger patch, then on a larger batch.

    It plans for width 512 and writes no width into the plans, so that both trainers run with them.
    """

    network_class = ImplicitUNet
    trainer = "nnUNetTrainerImplicit"
    default_plans_name = "nnUNetImplicitPlans"
