"""Trainer of both stages of meU-net's cascade, the first in one pass."""

from __future__ import annotations

from nnunet_ext.architectures.checkpointed.levels import Recompute
from nnunet_ext.trainers.compiled_ddp import CompiledCheckpointsMixin
from nnunet_ext.trainers.nnUNetTrainerMeCascade import nnUNetTrainerMeCascade


class nnUNetTrainerMeCascadeOnePass(CompiledCheckpointsMixin, nnUNetTrainerMeCascade):
    """meU-net's cascade whose branches learn from all of their expanded patches at full resolution.

    The finest level of all networks is computed once more in the backward pass. Both stages need this trainer.
    """

    recompute: Recompute | None = "finest"
    one_pass = True
