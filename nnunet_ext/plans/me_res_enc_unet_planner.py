"""Planner of meU-net on nnU-Net's residual encoder network."""

from __future__ import annotations

from collections.abc import Mapping

from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)

from nnunet_ext.plans.expanded_patch import ExpandedPatchPlanner


class MeResEncUNetPlanner(ExpandedPatchPlanner, nnUNetPlannerResEncM):
    """Plans like nnU-Net's ResEnc M, and half as much more context around the patch for `nnUNetTrainerMeUNet`."""

    network_class = ResidualEncoderUNet
    trainer = "nnUNetTrainerMeUNet"
    default_plans_name = "nnUNetMeResEncUNetMPlans"
    expanded_share: Mapping[int, float] = {2: 0.58, 3: 0.30}
