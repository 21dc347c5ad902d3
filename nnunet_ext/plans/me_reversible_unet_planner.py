"""Planner of meU-net on the partially reversible U-Net."""

from __future__ import annotations

from collections.abc import Mapping

from nnunet_ext.plans.expanded_patch import ExpandedPatchPlanner
from nnunet_ext.plans.reversible_unet_planner import ReversibleUNetPlanner


class MeReversibleUNetPlanner(ExpandedPatchPlanner, ReversibleUNetPlanner):
    """Spends the memory that `ReversibleUNet` frees on a larger standard patch, and expands it.

    For `nnUNetTrainerMeReversible`.
    """

    trainer = "nnUNetTrainerMeReversible"
    default_plans_name = "nnUNetMeReversiblePlans"
    expanded_share: Mapping[int, float] = {2: 0.5, 3: 0.30}
