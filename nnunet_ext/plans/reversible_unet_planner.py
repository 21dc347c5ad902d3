"""Planner of the partially reversible U-Net."""

from __future__ import annotations

from nnunet_ext.architectures.reversible_unet import ReversibleUNet
from nnunet_ext.plans.memory_planner import MemoryPlanner


class ReversibleUNetPlanner(MemoryPlanner):
    """Spends the memory that `ReversibleUNet` frees on a larger patch, then on a larger batch."""

    network_class = ReversibleUNet
    trainer = "nnUNetTrainerReversible"
    default_plans_name = "nnUNetReversiblePlans"
