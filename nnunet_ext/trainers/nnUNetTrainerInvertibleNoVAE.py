"""Trainer of the fully invertible U-Net without the VAE branch."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ext.architectures.invertible_unet import InvertibleUNet
from nnunet_ext.trainers.checkpointing import AtomicCheckpointMixin
from nnunet_ext.trainers.from_plans import builds
from nnunet_ext.trainers.several_gpus import SeveralGPUsMixin


class nnUNetTrainerInvertibleNoVAE(AtomicCheckpointMixin, SeveralGPUsMixin, nnUNetTrainer):
    """Fully-InvRes (Yamazaki et al. 2021) without the VAE branch."""

    build_network_architecture = builds(InvertibleUNet)
