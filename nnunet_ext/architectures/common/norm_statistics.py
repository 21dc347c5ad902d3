"""What norms need of the coarsest feature map: more than one value to take a mean and a variance of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

if TYPE_CHECKING:
    from typing_extensions import Self

Over = Literal["sample", "batch"] | None


@dataclass(frozen=True, kw_only=True)
class NormStatistics:
    """What a network's norms compute statistics over; None: over nothing.

    Args:
        in_training, in_evaluation: Each sample or the batch, in that mode.
    """

    in_training: Over = None
    in_evaluation: Over = None

    @classmethod
    def of(cls, network: nn.Module) -> Self:
        """Look at the norms of a network; one over several processes has more samples than are seen here."""
        norms: list[Any] = [
            m for m in network.modules() if isinstance(m, (_InstanceNorm, _BatchNorm)) and type(m) is not SyncBatchNorm
        ]
        return cls(
            in_training=_over(norms), in_evaluation=_over([norm for norm in norms if not norm.track_running_stats])
        )

    def check(self, x: Tensor, coarsest: Sequence[int], training: bool) -> None:
        """Refuse a batch whose coarsest feature map is too small.

        Args:
            x: Batch of images.
            coarsest: Voxels per axis of the map.
            training: Whether the network is in training mode.

        Raises:
            ValueError: names patch and batch.
        """
        over = self.in_training if training else self.in_evaluation
        if over is None or prod(coarsest) * (1 if over == "sample" else len(x)) != 1:
            return
        if over == "batch" and dist.is_available() and dist.is_initialized():
            return  # nnU-Net makes it one over all processes when the network is built
        where = "each sample" if over == "sample" else "the batch"
        raise ValueError(
            f"Norms need more than one voxel in the coarsest feature map of {where}, got a batch of {len(x)} and a "
            f"patch of {list(x.shape[2:])}, of which the strides leave one: use a larger patch, or plan fewer stages."
        )


def _over(norms: Sequence[nn.Module]) -> Over:
    if any(isinstance(norm, _InstanceNorm) for norm in norms):
        return "sample"
    return "batch" if norms else None
