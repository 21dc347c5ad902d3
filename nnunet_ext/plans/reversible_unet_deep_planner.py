"""Depth preset of the partially reversible U-Net's planner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunet_ext.plans.reversible_unet_planner import ReversibleUNetPlanner


class ReversibleUNetDeepPlanner(ReversibleUNetPlanner):
    """`ReversibleUNetPlanner` with four blocks per stage: about twice the time, no more activations held."""

    network_options: Mapping[str, Any] = {"blocks_per_stage": 4}
    default_plans_name = "nnUNetReversibleDeepPlans"
