"""Trainer of `nnUNetTrainerFasterFusionBN` with a teacher."""

from __future__ import annotations

from nnunet_ext.trainers.distillation import DistillationMixin
from nnunet_ext.trainers.nnUNetTrainerFasterFusionBN import nnUNetTrainerFasterFusionBN


class nnUNetTrainerFasterFusionBNDistilled(DistillationMixin, nnUNetTrainerFasterFusionBN):
    """`nnUNetTrainerFasterFusionBN`, taught by a trained model."""
