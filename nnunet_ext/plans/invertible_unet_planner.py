"""Planner of the fully invertible U-Net."""

from __future__ import annotations

from nnunet_ext.architectures.invertible_unet import InvertibleUNet
from nnunet_ext.plans.memory_planner import MemoryPlanner


class InvertibleUNetPlanner(MemoryPlanner):
    """Spends the memory that `InvertibleUNet` frees on a larger patch, then on a larger batch."""

    network_class = InvertibleUNet
    trainer = "nnUNetTrainerInvertible"
    default_plans_name = "nnUNetInvertiblePlans"
