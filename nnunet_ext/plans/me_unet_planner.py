"""Planner of meU-net on nnU-Net's own network."""

from __future__ import annotations

from dynamic_network_architectures.architectures.unet import PlainConvUNet

from nnunet_ext.plans.expanded_patch import ExpandedPatchPlanner


class MeUNetPlanner(ExpandedPatchPlanner):
    """Plans nnU-Net's own network and patch, and half as much more context around it for `nnUNetTrainerMeUNet`."""

    network_class = PlainConvUNet
    trainer = "nnUNetTrainerMeUNet"
    default_plans_name = "nnUNetMePlans"
