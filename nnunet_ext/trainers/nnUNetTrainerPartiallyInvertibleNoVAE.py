"""Trainer of the partially invertible U-Net without the VAE branch."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_ext.architectures.partially_invertible_unet import PartiallyInvertibleUNet
from nnunet_ext.trainers.checkpointing import AtomicCheckpointMixin
from nnunet_ext.trainers.from_plans import build_from_plans


class nnUNetTrainerPartiallyInvertibleNoVAE(AtomicCheckpointMixin, nnUNetTrainer):
    """Partially-InvRes (Yamazaki et al. 2021) without the VAE branch."""

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build `PartiallyInvertibleUNet` from the plans, for training and prediction."""
        return build_from_plans(
            PartiallyInvertibleUNet,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
