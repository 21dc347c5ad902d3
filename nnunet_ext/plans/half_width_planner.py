"""Planner of nnU-Net's own network at half of its width."""

from __future__ import annotations

from dynamic_network_architectures.architectures.unet import PlainConvUNet

from nnunet_ext.plans.memory_planner import MemoryPlanner


class HalfWidthPlanner(MemoryPlanner):
    """Spends the memory that half of the features free on a larger patch, then on a larger batch.

    The plans hold nnU-Net's own network, whose features the trainer halves.
    """

    network_class = PlainConvUNet
    trainer = "nnUNetTrainerHalfWidthBN"
    default_plans_name = "nnUNetHalfWidthPlans"
