"""Trainer of full resolution on all of meU-net's large patch, in one pass."""

from __future__ import annotations

from nnunet_ext.architectures.checkpointed.levels import Recompute
from nnunet_ext.trainers.nnUNetTrainerActivationCheckpointing import nnUNetTrainerActivationCheckpointing


class nnUNetTrainerMeUNetOnePass(nnUNetTrainerActivationCheckpointing):
    """All levels learn from the large patch, the finest is computed once more in the backward pass.

    At about the memory of meU-net's two passes (k = 1.5): in those full resolution never learns from what only the
    large patch shows. Plans are those of `MeUNetPlanner` or any others of nnU-Net's own networks, whose patch is the
    large one. Gradients, checkpoints and results are those of nnU-Net's default trainer.
    """

    recompute: Recompute = "finest"
