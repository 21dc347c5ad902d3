"""Trainer of meU-net on nnU-Net's own networks with activation checkpointing: both savings multiply."""

from __future__ import annotations

from nnunet_ext.trainers.me_unet import MeUNetTrainerMixin
from nnunet_ext.trainers.nnUNetTrainerActivationCheckpointing import nnUNetTrainerActivationCheckpointing


class nnUNetTrainerMeCheckpointing(MeUNetTrainerMixin, nnUNetTrainerActivationCheckpointing):
    """meU-net's training step (Wang et al. 2022) on nnU-Net's own networks, whose stages are recomputed.

    The patch of the plans is the large one. Checkpoints are those of nnU-Net's default trainer.
    """
