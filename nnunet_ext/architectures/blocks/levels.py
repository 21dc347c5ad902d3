"""Steps of a reversible chain that change the resolution: channels go down, the others wait as a skip.

Invertible down- and upsampling: Yamazaki et al. 2021, https://arxiv.org/abs/2103.09042 ("based on squeezing"); learned
by an orthogonal mixing of channels as in iUNets (Etmann et al. 2020, https://arxiv.org/abs/2005.05220). The feature map
is a pair of halves of its channels, as the couplings take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

Halves = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Streams:
    """What lives between two steps.

    Args:
        halves: of the channels of the feature map.
        skips: what the levels above left behind, finest first, as halves.
    """

    halves: Halves
    skips: tuple[Halves, ...] = ()


def part(halves: Halves, channels: int) -> tuple[Tensor, Halves]:
    """Take the first `channels` off a feature map; the rest as halves that keep nothing else alive."""
    first, second = halves
    if channels <= first.shape[1]:
        return first[:, :channels], (first[:, channels:].clone(), second)
    more = channels - first.shape[1]
    return torch.cat((first, second[:, :more]), dim=1), (first[:, :0], second[:, more:].clone())


def join(taken: Tensor, rest: Halves) -> Halves:
    """Put back what `part` has taken."""
    half = (taken.shape[1] + rest[0].shape[1] + rest[1].shape[1]) // 2
    if taken.shape[1] <= half:
        return torch.cat((taken, rest[0]), dim=1), rest[1]
    return taken[:, :half], torch.cat((taken[:, half:], rest[1]), dim=1)


class Squeeze(nn.Module):
    """Pixel unshuffle with a stride per axis, then an orthogonal mixing of the channels: a bijection.

    forward: ``y = Q squeeze(x)``; inverse: ``x = unsqueeze(Q^T y)``.

    Args:
        channels: of x.
        stride: per axis.
        mixing: whether Q is learned; without it forward only moves numbers.

    Shape: (B, channels, *spatial) -> (B, channels * prod(stride), *spatial / stride).

    Raises:
        ValueError: the stride does not divide the size.
    """

    def __init__(self, channels: int, stride: Sequence[int], mixing: bool) -> None:
        super().__init__()
        self.channels = channels
        self.stride = tuple(stride)
        n = channels * prod(stride)
        # Cayley's map: cheap, and orthogonal to rounding.
        self.mixing = (
            orthogonal(nn.Linear(n, n, bias=False), orthogonal_map="cayley", use_trivialization=False)
            if mixing
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        if any(size % step for size, step in zip(x.shape[2:], self.stride, strict=True)):
            raise ValueError(
                f"Squeeze needs sizes that its stride {list(self.stride)} divides, got {list(x.shape[2:])}: use a "
                "patch that the network's strides divide, as nnU-Net plans it."
            )
        sizes = [n for size, step in zip(x.shape[2:], self.stride, strict=True) for n in (size // step, step)]
        dim = len(self.stride)
        order = [0, 1, *range(3, 3 + 2 * dim, 2), *range(2, 2 + 2 * dim, 2)]
        y = x.reshape(*x.shape[:2], *sizes).permute(order)  # (B, C, *stride, *spatial / stride)
        return self._mix(y.reshape(x.shape[0], -1, *sizes[::2]), transposed=False)

    def inverse(self, y: Tensor) -> Tensor:
        """Return x."""
        y = self._mix(y, transposed=True)
        dim = len(self.stride)
        x = y.reshape(y.shape[0], self.channels, *self.stride, *y.shape[2:])
        order = [0, 1, *(axis for i in range(dim) for axis in (2 + dim + i, 2 + i))]
        size = [n * step for n, step in zip(y.shape[2:], self.stride, strict=True)]
        return x.permute(order).reshape(y.shape[0], self.channels, *size)

    def _mix(self, y: Tensor, transposed: bool) -> Tensor:
        if self.mixing is None:
            return y
        with torch.autocast(y.device.type, enabled=False):  # in low precision the transpose is no inverse
            weight = cast(Tensor, self.mixing.weight)
            return ((weight.T if transposed else weight) @ y.flatten(2)).view(y.shape)


class Descend(nn.Module):
    """Leave a skip behind and squeeze the other channels; the inverse joins them again.

    Args:
        squeeze: of the channels that go down.

    Shape: halves of (B, C, *spatial) -> halves of (B, squeeze.channels * prod(stride), *spatial / stride).
    """

    def __init__(self, squeeze: Squeeze) -> None:
        super().__init__()
        self.squeeze = squeeze

    def forward(self, streams: Streams) -> Streams:
        """Go one level down."""
        taken, rest = part(streams.halves, self.squeeze.channels)
        return Streams(_halves(self.squeeze(taken)), (*streams.skips, rest))

    def inverse(self, streams: Streams) -> Streams:
        """Go back up."""
        *skips, rest = streams.skips
        taken = self.squeeze.inverse(torch.cat(streams.halves, dim=1))
        return Streams(join(taken, rest), tuple(skips))


class Ascend(nn.Module):
    """Unsqueeze a feature map and join it with the skip of its level; the inverse is a `Descend`.

    Args:
        squeeze: whose inverse leads up.

    Shape: halves of (B, squeeze.channels * prod(stride), *spatial / stride) -> halves of (B, C, *spatial).
    """

    def __init__(self, squeeze: Squeeze) -> None:
        super().__init__()
        self.squeeze = squeeze

    def forward(self, streams: Streams) -> Streams:
        """Go one level up."""
        *skips, rest = streams.skips
        taken = self.squeeze.inverse(torch.cat(streams.halves, dim=1))
        return Streams(join(taken, rest), tuple(skips))

    def inverse(self, streams: Streams) -> Streams:
        """Go back down."""
        taken, rest = part(streams.halves, self.squeeze.channels)
        return Streams(_halves(self.squeeze(taken)), (*streams.skips, rest))


class Tap(nn.Module):
    """Give the feature map out of the chain, for a head; the chain goes on with it unchanged."""

    def forward(self, streams: Streams) -> Streams:
        """Change nothing; the chain takes the feature map."""
        return streams

    inverse = forward


def _halves(x: Tensor) -> Halves:
    first, second = x.chunk(2, dim=1)
    return first, second
