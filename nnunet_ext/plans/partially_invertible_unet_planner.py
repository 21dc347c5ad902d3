"""Planner of the partially invertible U-Net."""

from __future__ import annotations

from nnunet_ext.architectures.partially_invertible_unet import PartiallyInvertibleUNet
from nnunet_ext.plans.memory_planner import MemoryPlanner


class PartiallyInvertibleUNetPlanner(MemoryPlanner):
    """Spends the memory that `PartiallyInvertibleUNet` frees on a larger patch, then on a larger batch."""

    network_class = PartiallyInvertibleUNet
    trainer = "nnUNetTrainerPartiallyInvertible"
    default_plans_name = "nnUNetPartiallyInvertiblePlans"
