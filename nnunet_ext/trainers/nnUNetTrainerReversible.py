"""Trainer of the partially reversible U-Net."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_ext.architectures.reversible_unet import ReversibleUNet
from nnunet_ext.trainers.checkpointing import AtomicCheckpointMixin
from nnunet_ext.trainers.from_plans import build_from_plans


class nnUNetTrainerReversible(AtomicCheckpointMixin, nnUNetTrainer):
    """Partially reversible U-Net (Bruegger et al. 2019) with nnU-Net's own schedule, loss and augmentation.

    Runs with default and ResEnc plans, and with those of `ReversibleUNetPlanner`, which also hold the network's
    options.
    """

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build `ReversibleUNet` from the plans, for training and prediction."""
        return build_from_plans(
            ReversibleUNet,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
