"""Planner of nnU-Net's own network and trainer by counted memory: the rival of every other planner here."""

from __future__ import annotations

from dynamic_network_architectures.architectures.unet import PlainConvUNet

from nnunet_ext.plans.memory_planner import MemoryPlanner


class CountedMemoryPlanner(MemoryPlanner):
    """Fills the target with nnU-Net's own network: what a larger patch owes to counted memory, without any method."""

    network_class = PlainConvUNet
    default_plans_name = "nnUNetCountedMemoryPlans"
