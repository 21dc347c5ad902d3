"""Planner of the fully invertible U-Net."""

from __future__ import annotations

from nnunet_ext.architectures.invertible_unet import InvertibleUNet
from nnunet_ext.plans.freed_memory_planner import FreedMemoryPlanner


class InvertibleUNetPlanner(FreedMemoryPlanner):
    """Spends the memory that `InvertibleUNet` frees on a larger patch, then on a larger batch."""

    network_class = InvertibleUNet
    trainer = "nnUNetTrainerInvertible"
    default_plans_name = "nnUNetInvertiblePlans"
