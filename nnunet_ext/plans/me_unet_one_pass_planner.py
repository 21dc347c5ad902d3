"""Planner of meU-net in one pass on nnU-Net's own network."""

from __future__ import annotations

from math import prod
from typing import Any

from nnunet_ext.plans.me_unet_planner import MeUNetPlanner


class MeUNetOnePassPlanner(MeUNetPlanner):
    """As `MeUNetPlanner`, for the step of `nnUNetTrainerMeUNetOnePass`, which needs more memory at the same patch."""

    trainer = "nnUNetTrainerMeUNetOnePass"
    default_plans_name = "nnUNetMeOnePassPlans"

    def memory_voxels(self, plan: dict[str, Any]) -> float:
        """Of the coarse levels on kP, and the finest on P."""
        patch = plan["patch_size"]
        share = self.expanded_share[len(patch)]
        return share * prod(patch) + (1 - share) * prod(self.decisive_patch(plan))
