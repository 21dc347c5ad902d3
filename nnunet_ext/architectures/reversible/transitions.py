"""Steps of a chain that have no inverse: what the way back can't recompute of them is kept, or follows from what is.

The partially reversible U-Net keeps one feature map per level of its decoder: a skip that was added is found again by
subtraction. A skip that was concatenated (Partially-InvRes) is kept too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from nnunet_ext.architectures.reversible.steps import Halves, Pass, Step, Streams, halves_of, rounded

if TYPE_CHECKING:
    from nnunet_ext.architectures.reversible.walk import State, Walk


class Transition(Step):
    """A step that evaluates one module.

    Args:
        module: What leads to another resolution, or to the logits.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def shifts(self) -> tuple[nn.Module, ...]:
        """The module."""
        return (self.module,)


class Down(Transition):
    """Lead down, ``y = module(x)``; x stays as the skip, from which the way back starts again."""

    def run(self, streams: Streams, forward: Pass) -> Streams:
        """Go one level down."""
        x = forward.whole(streams.halves)
        return Streams(forward.split(forward.evaluate(self.module, x)), (*streams.skips, (x,)))

    def walk_back(self, state: State, walk: Walk) -> None:
        """Take the skip, and add the gradient of both of its uses."""
        (x,), (d_skip,) = state.skips.pop()
        state.start((x, None, None), d_skip.add_(*walk.through(self.module, (x,), state.leave())))


class Up(Transition):
    """Lead up and add the skip, ``s = module(x) + skip``; x is kept, and ``skip = s - module(x)``."""

    def run(self, streams: Streams, forward: Pass) -> Streams:
        """Go one level up."""
        *skips, (skip,) = streams.skips
        x = forward.anchor(streams.halves)
        streams_of_skip = forward.split(skip)
        shifts = self._shifts(forward.evaluate(self.module, x), streams_of_skip[0].dtype, forward.is_exact)
        first, second = (stream + shift for stream, shift in zip(streams_of_skip, shifts, strict=True))
        return Streams((first, second), tuple(skips))

    def walk_back(self, state: State, walk: Walk) -> None:
        """Subtract what was added; its gradient is that of the skip too."""
        anchor = walk.anchor()
        d_s = state.take_gradient()

        def recover(y: Tensor) -> None:
            state.subtract(self._shifts(y, state.given.dtype, walk.is_exact))
            state.skips.append(((state.take(),), (d_s,)))

        state.start(anchor, *walk.through(self.module, anchor[:1], d_s, look=recover))

    @staticmethod
    def _shifts(y: Tensor, dtype: torch.dtype, is_exact: bool) -> Halves:
        first, second = halves_of(y)
        return (rounded(first.to(dtype)), rounded(second.to(dtype))) if is_exact else (first, second)


class Join(Transition):
    """Lead up and join with the skip in any way, ``y = module(x, skip)``; both are kept."""

    def run(self, streams: Streams, forward: Pass) -> Streams:
        """Go one level up."""
        *skips, (skip,) = streams.skips
        forward.keep(skip)
        x = forward.anchor(streams.halves)
        return Streams(forward.split(forward.evaluate(self.module, x, skip)), tuple(skips))

    def walk_back(self, state: State, walk: Walk) -> None:
        """Take what was kept."""
        anchor = walk.anchor()
        skip = cast(Tensor, walk.kept.pop())
        d_x, d_skip = walk.through(self.module, (anchor[0], skip), state.leave())
        state.skips.append(((skip,), (d_skip,)))
        state.start(anchor, d_x)


class Head(Transition):
    """Give logits out; the chain goes on with the feature map unchanged."""

    def run(self, streams: Streams, forward: Pass) -> Streams:
        """Note the logits."""
        forward.taps.append(forward.evaluate(self.module, forward.whole(streams.halves)))
        return streams

    def invert(self, streams: Streams) -> Streams:
        """Change nothing."""
        return streams

    def walk_back(self, state: State, walk: Walk) -> None:
        """Add the gradient of what was given out."""
        gradient = walk.taps.pop()
        if gradient is None:
            walk.pass_over()
        else:
            state.add(*walk.through(self.module, (state.whole(),), gradient))


class Tap(Step):
    """Give the feature map out; the chain goes on with it unchanged."""

    def run(self, streams: Streams, forward: Pass) -> Streams:
        """Note the feature map."""
        forward.taps.append(forward.whole(streams.halves))
        return streams

    def invert(self, streams: Streams) -> Streams:
        """Change nothing."""
        return streams

    def walk_back(self, state: State, walk: Walk) -> None:
        """Add the gradient of what was given out."""
        gradient = walk.taps.pop()
        if gradient is not None:
            state.add(gradient)
