"""Trainer of meU-net in one pass with activation checkpointing."""

from __future__ import annotations

from nnunet_ext.trainers.nnUNetTrainerMeCheckpointing import nnUNetTrainerMeCheckpointing


class nnUNetTrainerMeCheckpointingOnePass(nnUNetTrainerMeCheckpointing):
    """`nnUNetTrainerMeUNetOnePass` on networks whose stages the backward pass computes once more."""

    one_pass = True
