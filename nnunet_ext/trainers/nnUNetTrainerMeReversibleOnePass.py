"""Trainer of meU-net in one pass on the partially reversible U-Net."""

from __future__ import annotations

from nnunet_ext.trainers.nnUNetTrainerMeReversible import nnUNetTrainerMeReversible


class nnUNetTrainerMeReversibleOnePass(nnUNetTrainerMeReversible):
    """`nnUNetTrainerMeUNetOnePass` on the partially reversible U-Net (Bruegger et al. 2019)."""

    one_pass = True
