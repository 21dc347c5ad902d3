"""Trainer of the partially invertible U-Net without the VAE branch."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ext.architectures.partially_invertible_unet import PartiallyInvertibleUNet
from nnunet_ext.trainers.checkpointing import AtomicCheckpointMixin
from nnunet_ext.trainers.from_plans import builds
from nnunet_ext.trainers.several_gpus import SeveralGPUsMixin


class nnUNetTrainerPartiallyInvertibleNoVAE(AtomicCheckpointMixin, SeveralGPUsMixin, nnUNetTrainer):
    """Partially-InvRes (Yamazaki et al. 2021) without the VAE branch."""

    build_network_architecture = builds(PartiallyInvertibleUNet)
