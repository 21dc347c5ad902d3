"""Trainer of the Implicit U-Net."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ext.architectures.implicit_unet import ImplicitUNet
from nnunet_ext.trainers.checkpointing import AtomicCheckpointMixin
from nnunet_ext.trainers.implicit import ImplicitTrainerMixin
from nnunet_ext.trainers.several_gpus import SeveralGPUsMixin


class nnUNetTrainerImplicit(ImplicitTrainerMixin, AtomicCheckpointMixin, SeveralGPUsMixin, nnUNetTrainer):
    """Implicit U-Net with a decoder of width 512, trained on points, with AdamW.

    Runs with default and ResEnc plans, whose depths it does not use, and with those of `ImplicitUNetPlanner`.
    """

    network_class = ImplicitUNet
