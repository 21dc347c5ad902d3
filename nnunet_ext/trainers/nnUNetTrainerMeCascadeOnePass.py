"""Trainer of both stages of meU-net's cascade, the first in one pass."""

from __future__ import annotations

from nnunet_ext.trainers.nnUNetTrainerMeCascade import nnUNetTrainerMeCascade


class nnUNetTrainerMeCascadeOnePass(nnUNetTrainerMeCascade):
    """meU-net's cascade whose first stage trains each branch as `nnUNetTrainerMeUNetOnePass` trains its network."""

    one_pass = True
