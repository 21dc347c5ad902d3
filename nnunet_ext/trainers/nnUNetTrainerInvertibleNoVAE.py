"""Trainer of the fully invertible U-Net without the VAE branch."""

from __future__ import annotations

from nnunet_ext.architectures.invertible_unet import InvertibleUNet
from nnunet_ext.trainers.adamw import AdamWMixin
from nnunet_ext.trainers.core import CoreTrainer
from nnunet_ext.trainers.from_plans import builds


class nnUNetTrainerInvertibleNoVAE(AdamWMixin, CoreTrainer):
    """Fully-InvRes (Yamazaki et al. 2021) without the VAE branch, AdamW."""

    build_network_architecture = builds(InvertibleUNet)
