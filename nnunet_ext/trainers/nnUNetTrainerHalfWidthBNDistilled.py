"""Trainer of `nnUNetTrainerHalfWidthBN` with a teacher."""

from __future__ import annotations

from nnunet_ext.trainers.distillation import DistillationMixin
from nnunet_ext.trainers.nnUNetTrainerHalfWidthBN import nnUNetTrainerHalfWidthBN


class nnUNetTrainerHalfWidthBNDistilled(DistillationMixin, nnUNetTrainerHalfWidthBN):
    """`nnUNetTrainerHalfWidthBN`, taught by a trained model."""
