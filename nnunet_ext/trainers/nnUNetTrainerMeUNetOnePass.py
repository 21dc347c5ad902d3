"""Trainer of meU-net in one pass, on nnU-Net's own networks."""

from __future__ import annotations

from nnunet_ext.trainers.nnUNetTrainerMeUNet import nnUNetTrainerMeUNet


class nnUNetTrainerMeUNetOnePass(nnUNetTrainerMeUNet):
    """meU-net whose finest level is trained with the features that coarser levels have of the large patch.

    `nnUNetTrainerMeUNet` trains it with those of the small patch, in less memory.
    """

    one_pass = True
