"""Trainer of meU-net on the partially reversible U-Net: both savings multiply."""

from __future__ import annotations

from nnunet_ext.trainers.me_unet import MeUNetTrainerMixin
from nnunet_ext.trainers.nnUNetTrainerReversible import nnUNetTrainerReversible


class nnUNetTrainerMeReversible(MeUNetTrainerMixin, nnUNetTrainerReversible):
    """meU-net's training step (Wang et al. 2022) on the partially reversible U-Net (Bruegger et al. 2019), AdamW.

    Runs with default and ResEnc plans, whose patch is the large one, and with those of `MeReversibleUNetPlanner`.
    """
