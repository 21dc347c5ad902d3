"""Trainer of the partially reversible U-Net."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ext.architectures.reversible_unet import ReversibleUNet
from nnunet_ext.trainers.checkpointing import AtomicCheckpointMixin
from nnunet_ext.trainers.from_plans import builds
from nnunet_ext.trainers.several_gpus import SeveralGPUsMixin


class nnUNetTrainerReversible(AtomicCheckpointMixin, SeveralGPUsMixin, nnUNetTrainer):
    """Partially reversible U-Net (Bruegger et al. 2019) with nnU-Net's own schedule, loss and augmentation.

    Runs with default and ResEnc plans, and with those of `ReversibleUNetPlanner`, which also hold the network's
    options.
    """

    build_network_architecture = builds(ReversibleUNet)
