"""Trainer of both stages of meU-net's cascade with activation checkpointing."""

from __future__ import annotations

from nnunet_ext.architectures.checkpointed.levels import Recompute
from nnunet_ext.trainers.compiled_ddp import CompiledCheckpointsMixin
from nnunet_ext.trainers.nnUNetTrainerMeCascade import nnUNetTrainerMeCascade


class nnUNetTrainerMeCascadeCheckpointing(CompiledCheckpointsMixin, nnUNetTrainerMeCascade):
    """meU-net's cascade (Wang et al. 2022) on networks whose stages the backward pass computes once more.

    Both stages need this trainer, or that without checkpointing: nnU-Net looks for the first under the same name.
    """

    recompute: Recompute | None = "stages"
