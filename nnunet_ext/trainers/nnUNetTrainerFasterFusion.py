"""Trainer of the FasterFusion U-Net as in the paper, but for its stride and its form in prediction."""

from __future__ import annotations

from nnunet_ext.architectures.faster_fusion_unet import FasterFusionUNet
from nnunet_ext.trainers.core import CoreTrainer
from nnunet_ext.trainers.from_plans import builds


class nnUNetTrainerFasterFusion(CoreTrainer):
    """FasterFusion (Heinrich, Hagenah 2023) from 160 channels on: 3.5 times fewer parameters, hardly faster.

    Prediction runs the fused network by itself; so does validation where nnU-Net does not compile.
    """

    build_network_architecture = builds(FasterFusionUNet, threshold=160, batch_norm=False)
