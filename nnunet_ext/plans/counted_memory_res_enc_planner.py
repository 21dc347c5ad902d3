"""Planner of nnU-Net's own residual encoder network and trainer by counted memory."""

from __future__ import annotations

from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)

from nnunet_ext.plans.memory_planner import MemoryPlanner


class CountedMemoryResEncPlanner(MemoryPlanner, nnUNetPlannerResEncM):
    """Fills the target with the network of nnU-Net's ResEnc presets, which differ in nothing but theirs."""

    network_class = ResidualEncoderUNet
    default_plans_name = "nnUNetCountedMemoryResEncPlans"
