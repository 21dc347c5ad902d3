"""Planner of meU-net's cascade on nnU-Net's residual encoder network."""

from __future__ import annotations

from nnunet_ext.plans.me_cascade_planner import MeCascadePlanner
from nnunet_ext.plans.me_res_enc_unet_planner import MeResEncUNetPlanner


class MeCascadeResEncPlanner(MeCascadePlanner, MeResEncUNetPlanner):
    """Plans meU-net's cascade like `MeCascadePlanner`, of the network of nnU-Net's ResEnc M."""

    network_class = MeResEncUNetPlanner.network_class
    default_plans_name = "nnUNetMeCascadeResEncUNetMPlans"
