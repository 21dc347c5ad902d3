"""Trainer of the partially invertible U-Net without the VAE branch."""

from __future__ import annotations

from nnunet_ext.architectures.partially_invertible_unet import PartiallyInvertibleUNet
from nnunet_ext.trainers.core import CoreTrainer
from nnunet_ext.trainers.from_plans import builds


class nnUNetTrainerPartiallyInvertibleNoVAE(CoreTrainer):
    """Partially-InvRes (Yamazaki et al. 2021) without the VAE branch."""

    build_network_architecture = builds(PartiallyInvertibleUNet)
