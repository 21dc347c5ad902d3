"""Steps of a reversible chain that change the resolution: channels go down, the others wait as a skip.

Invertible down- and upsampling: Yamazaki et al. 2021, https://arxiv.org/abs/2103.09042 ("based on squeezing"); learned
by an orthogonal mixing of channels as in iUNets (Etmann et al. 2020, https://arxiv.org/abs/2005.05220).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from nnunet_ext.architectures.reversible.mixed_precision import full_precision_products
from nnunet_ext.architectures.reversible.steps import Pass, Step, Streams, halves_of, join, part

if TYPE_CHECKING:
    from nnunet_ext.architectures.reversible.walk import State, Walk


class Mixing(nn.Module):
    """Holds `weight`, a matrix that mixes channels; what a folded `OrthogonalMixing` becomes."""

    weight: Tensor


class OrthogonalMixing(Mixing):
    """A learned orthogonal matrix, ``Q = (I - A / 2)^-1 (I + A / 2)`` with A skew-symmetric (Cayley's map).

    Cheap, and orthogonal to rounding. Keys, and what folding needs, are those of `torch.nn.utils.parametrize`; modules
    of that can't be saved whole, nor be cast to half precision.

    Args:
        n: Rows and columns.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        parametrization = nn.Module()
        parametrization.original = nn.Linear(n, n, bias=False).weight
        self.parametrizations = nn.ModuleDict({"weight": parametrization})

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Q: each access solves a system of equations."""
        original = cast(Tensor, self.parametrizations["weight"].original)
        with torch.autocast(original.device.type, enabled=False):
            lower = original.to(torch.promote_types(original.dtype, torch.float32)).tril()
            a = lower - lower.mT
            one = torch.eye(len(a), dtype=a.dtype, device=a.device)
            # Never singular, so nothing is checked: on CUDA a check waits for the device.
            q, _ = torch.linalg.solve_ex(one - a / 2, one + a / 2)
            return q.to(original.dtype)


class Squeeze(nn.Module):
    """Pixel unshuffle with a stride per axis, then an orthogonal mixing of the channels: a bijection.

    forward: ``y = Q squeeze(x)``; inverse: ``x = unsqueeze(Q^T y)``.

    Args:
        channels: Channels of x.
        stride: Factor per axis.
        mixing: Whether Q is learned; without it forward only moves numbers.

    Shape: (B, channels, *spatial) -> (B, channels * prod(stride), *spatial / stride).

    Raises:
        ValueError: the stride does not divide the size.
    """

    def __init__(self, channels: int, stride: Sequence[int], mixing: bool) -> None:
        super().__init__()
        self.channels = channels
        self.stride = tuple(stride)
        n = channels * prod(stride)
        self.mixing: Mixing | None = OrthogonalMixing(n) if mixing else None

    def matrix(self) -> Tensor | None:
        """Q, for several calls of `forward` and `inverse`; None without mixing."""
        return None if self.mixing is None else self.mixing.weight

    def forward(self, x: Tensor, matrix: Tensor | None = None) -> Tensor:
        """Return y; `matrix` is what `matrix()` returned, None: compute it."""
        if any(size % step for size, step in zip(x.shape[2:], self.stride, strict=True)):
            raise ValueError(
                f"Squeeze needs sizes that its stride {list(self.stride)} divides, got {list(x.shape[2:])}: use a "
                "patch that the network's strides divide, as nnU-Net plans it."
            )
        sizes = [n for size, step in zip(x.shape[2:], self.stride, strict=True) for n in (size // step, step)]
        dim = len(self.stride)
        order = [0, 1, *range(3, 3 + 2 * dim, 2), *range(2, 2 + 2 * dim, 2)]
        y = x.reshape(*x.shape[:2], *sizes).permute(order)  # (B, C, *stride, *spatial / stride)
        return self._mix(y.reshape(x.shape[0], -1, *sizes[::2]), matrix, transposed=False)

    def inverse(self, y: Tensor, matrix: Tensor | None = None) -> Tensor:
        """Return x; `matrix` as in `forward`."""
        y = self._mix(y, matrix, transposed=True)
        dim = len(self.stride)
        x = y.reshape(y.shape[0], self.channels, *self.stride, *y.shape[2:])
        order = [0, 1, *(axis for i in range(dim) for axis in (2 + dim + i, 2 + i))]
        size = [n * step for n, step in zip(y.shape[2:], self.stride, strict=True)]
        return x.permute(order).reshape(y.shape[0], self.channels, *size)

    def _mix(self, y: Tensor, matrix: Tensor | None, transposed: bool) -> Tensor:
        matrix = self.matrix() if matrix is None else matrix
        if matrix is None:
            return y
        matrix = (matrix.T if transposed else matrix).to(y.dtype)
        # In low precision the transpose is no inverse.
        with torch.autocast(y.device.type, enabled=False), full_precision_products():
            return (matrix @ y.flatten(2)).view(y.shape)


class Descend(nn.Module, Step):
    """Leave a skip behind and squeeze the other channels; the inverse joins them again.

    Args:
        squeeze: Squeeze of the channels that go down.

    Shape: halves of (B, C, *spatial) -> halves of (B, squeeze.channels * prod(stride), *spatial / stride).
    """

    def __init__(self, squeeze: Squeeze) -> None:
        super().__init__()
        self.squeeze = squeeze

    def run(self, streams: Streams, forward: Pass) -> Streams:
        """Go one level down."""
        taken, rest = part(streams.halves, self.squeeze.channels)
        return Streams(halves_of(self.squeeze(taken, forward.matrix)), (*streams.skips, rest))

    def invert(self, streams: Streams) -> Streams:
        """Go back up."""
        *skips, (first, second) = streams.skips
        taken = self.squeeze.inverse(torch.cat(streams.halves, dim=1))
        return Streams(join(taken, (first, second)), tuple(skips))

    def walk_back(self, state: State, walk: Walk) -> None:
        """Go back up."""
        y, d_y = state.take_streams()
        x = walk.moved(self.squeeze.inverse, y)
        del y
        found = [x, walk.pulled(self.squeeze.forward, x, d_y)]
        del x, d_y
        state.join(found)

    def matrix(self) -> Tensor | None:
        """That of the squeeze."""
        return self.squeeze.matrix()


class Ascend(nn.Module, Step):
    """Unsqueeze a feature map and join it with the skip of its level; the inverse is a `Descend`.

    Args:
        squeeze: Squeeze whose inverse leads up.

    Shape: halves of (B, squeeze.channels * prod(stride), *spatial / stride) -> halves of (B, C, *spatial).
    """

    def __init__(self, squeeze: Squeeze) -> None:
        super().__init__()
        self.squeeze = squeeze

    def run(self, streams: Streams, forward: Pass) -> Streams:
        """Go one level up."""
        *skips, (first, second) = streams.skips
        taken = self.squeeze.inverse(torch.cat(streams.halves, dim=1), forward.matrix)
        return Streams(join(taken, (first, second)), tuple(skips))

    def invert(self, streams: Streams) -> Streams:
        """Go back down."""
        taken, rest = part(streams.halves, self.squeeze.channels)
        return Streams(halves_of(self.squeeze(taken)), (*streams.skips, rest))

    def walk_back(self, state: State, walk: Walk) -> None:
        """Go back down."""
        y, d_y = state.part(self.squeeze.channels)
        x = walk.moved(self.squeeze, y)
        del y
        state.set_streams(x, walk.pulled(self.squeeze.inverse, x, d_y))

    def matrix(self) -> Tensor | None:
        """That of the squeeze."""
        return self.squeeze.matrix()
