"""Trainer of the Implicit U-Net."""

from __future__ import annotations

from nnunet_ext.architectures.implicit_unet import ImplicitUNet
from nnunet_ext.trainers.core import CoreTrainer
from nnunet_ext.trainers.implicit import ImplicitTrainerMixin


class nnUNetTrainerImplicit(ImplicitTrainerMixin, CoreTrainer):
    """Implicit U-Net with a decoder of width 512, trained on points, with AdamW.

    Runs with default and ResEnc plans, whose depths it does not use, and with those of `ImplicitUNetPlanner`.
    """

    network_class = ImplicitUNet
