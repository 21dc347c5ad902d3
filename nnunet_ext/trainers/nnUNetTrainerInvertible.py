"""Trainer of the fully invertible U-Net with the VAE branch."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_ext.architectures.invertible_unet import InvertibleUNet
from nnunet_ext.trainers.checkpointing import AtomicCheckpointMixin
from nnunet_ext.trainers.from_plans import build_from_plans
from nnunet_ext.trainers.vae import VAETrainerMixin, image_channels


class nnUNetTrainerInvertible(VAETrainerMixin, AtomicCheckpointMixin, nnUNetTrainer):
    """Fully-InvRes with the VAE branch (Yamazaki et al. 2021), with nnU-Net's own schedule and augmentation.

    Runs with default and ResEnc plans, and with those of `InvertibleUNetPlanner`.
    """

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build `InvertibleUNet` from the plans; the branch runs in training only."""
        return build_from_plans(
            InvertibleUNet,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
            vae=True,
            image_channels=image_channels(configuration_manager),
        )
