"""Trainer of the partially invertible U-Net with the VAE branch."""

from __future__ import annotations

from nnunet_ext.architectures.partially_invertible_unet import PartiallyInvertibleUNet
from nnunet_ext.trainers.core import CoreTrainer
from nnunet_ext.trainers.from_plans import builds
from nnunet_ext.trainers.vae import VAETrainerMixin, image_channels


class nnUNetTrainerPartiallyInvertible(VAETrainerMixin, CoreTrainer):
    """Partially-InvRes with the VAE branch (Yamazaki et al. 2021), with nnU-Net's own schedule and augmentation.

    Runs with default and ResEnc plans, and with those of `PartiallyInvertibleUNetPlanner`.
    """

    build_network_architecture = builds(PartiallyInvertibleUNet, vae=True, image_channels=image_channels)
