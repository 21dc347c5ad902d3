"""Trainer of the partially reversible U-Net."""

from __future__ import annotations

from nnunet_ext.architectures.reversible_unet import ReversibleUNet
from nnunet_ext.trainers.adamw import AdamWMixin
from nnunet_ext.trainers.core import CoreTrainer
from nnunet_ext.trainers.from_plans import builds


class nnUNetTrainerReversible(AdamWMixin, CoreTrainer):
    """Partially reversible U-Net (Bruegger et al. 2019), AdamW, and nnU-Net's own schedule, loss and augmentation.

    Runs with default and ResEnc plans, and with those of `ReversibleUNetPlanner`, which also hold the network's
    options.
    """

    build_network_architecture = builds(ReversibleUNet)
