"""Trainer of the FasterFusion U-Net with batch norm everywhere."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ext.architectures.faster_fusion_unet import FasterFusionUNet
from nnunet_ext.trainers.checkpointing import AtomicCheckpointMixin
from nnunet_ext.trainers.from_plans import builds
from nnunet_ext.trainers.several_gpus import SeveralGPUsMixin


class nnUNetTrainerFasterFusionBN(AtomicCheckpointMixin, SeveralGPUsMixin, nnUNetTrainer):
    """FasterFusion from 128 channels on with batch norm everywhere: 4.3 times fewer parameters, norms folded.

    Prediction runs the fused network by itself, without any norm; so does validation where nnU-Net does not compile.
    """

    build_network_architecture = builds(FasterFusionUNet, threshold=128, batch_norm=True)
