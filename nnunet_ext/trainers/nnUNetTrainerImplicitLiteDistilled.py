"""Trainer of `nnUNetTrainerImplicitLite` with a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnunet_ext.architectures.implicit.point_sampling import at_points
from nnunet_ext.trainers.distillation import DistillationMixin
from nnunet_ext.trainers.nnUNetTrainerImplicitLite import nnUNetTrainerImplicitLite


class nnUNetTrainerImplicitLiteDistilled(DistillationMixin, nnUNetTrainerImplicitLite):
    """`nnUNetTrainerImplicitLite`, taught by a trained model at the points that the loss sees."""

    @staticmethod
    def at_outputs(logits: Tensor, drawn: Mapping[str, Any]) -> Tensor:
        """The teacher's logits at the points. Shape: (B, C, *patch) -> (B, C, K)."""
        return at_points(logits, drawn["points"])
