"""Planner of meU-net on nnU-Net's own network."""

from __future__ import annotations

from collections.abc import Mapping

from dynamic_network_architectures.architectures.unet import PlainConvUNet

from nnunet_ext.plans.expanded_patch import ExpandedPatchMixin
from nnunet_ext.plans.freed_memory_planner import FreedMemoryPlanner


class MeUNetPlanner(ExpandedPatchMixin, FreedMemoryPlanner):
    """Plans nnU-Net's own network and patch, and half as much more context around it for `nnUNetTrainerMeUNet`."""

    network_class = PlainConvUNet
    default_plans_name = "nnUNetMePlans"
    expanded_share: Mapping[int, float] = {2: 0.47, 3: 0.24}
