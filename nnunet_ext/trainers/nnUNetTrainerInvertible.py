"""Trainer of the fully invertible U-Net with the VAE branch."""

from __future__ import annotations

from nnunet_ext.architectures.invertible_unet import InvertibleUNet
from nnunet_ext.trainers.adamw import AdamWMixin
from nnunet_ext.trainers.core import CoreTrainer
from nnunet_ext.trainers.from_plans import builds
from nnunet_ext.trainers.vae import VAETrainerMixin, image_channels


class nnUNetTrainerInvertible(VAETrainerMixin, AdamWMixin, CoreTrainer):
    """Fully-InvRes with the VAE branch (Yamazaki et al. 2021), AdamW, and nnU-Net's own schedule and augmentation.

    Runs with default and ResEnc plans, and with those of `InvertibleUNetPlanner`.
    """

    build_network_architecture = builds(InvertibleUNet, vae=True, image_channels=image_channels)
