"""Planner of the FasterFusion U-Net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunet_ext.architectures.faster_fusion_unet import FasterFusionUNet
from nnunet_ext.plans.memory_planner import MemoryPlanner


class FasterFusionUNetPlanner(MemoryPlanner):
    """Plans `FasterFusionUNet` as `nnUNetTrainerFasterFusionBN` trains it.

    It saves parameters and time, not training memory, so patch and batch are about those of nnU-Net.
    """

    network_class = FasterFusionUNet
    network_options: Mapping[str, Any] = {"threshold": 128, "batch_norm": True}
    trainer = "nnUNetTrainerFasterFusionBN"
    default_plans_name = "nnUNetFasterFusionPlans"
