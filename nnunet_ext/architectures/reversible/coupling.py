"""Additive coupling, the reversible block of RevNet (Gomez et al. 2017, https://arxiv.org/abs/1707.04585).

New against the paper: the exact mode, in which float32 inverts bit for bit.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from nnunet_ext.architectures.reversible.steps import Evaluate, Halves, Pass, Step, Streams, evaluate, rounded

if TYPE_CHECKING:
    from nnunet_ext.architectures.reversible.walk import State, Walk

EXACT_RANGE = 2.0**12


class ExactRange:
    """Watches that the exact mode's streams stay where it is exact, with one wait for the device per training step.

    What chains of one network `note` in the forward pass stays on the device, until the first of them walks back.
    """

    def __init__(self) -> None:
        self.largest: Tensor | None = None

    def note(self, *streams: Tensor) -> None:
        """Take the largest values of streams into account, without a wait."""
        found = [torch.linalg.vector_norm(stream, float("inf")) for stream in streams if stream.numel()]
        found += [] if self.largest is None else [self.largest]
        if found:
            self.largest = torch.stack(found).amax()

    def look(self) -> None:
        """Warn if a value left the range since the last look."""
        largest, self.largest = self.largest, None
        if largest is None or isinstance(largest, FakeTensor) or largest.is_meta:
            return
        value = largest.item()
        if not value < EXACT_RANGE:  # NaN too
            warnings.warn(
                f"exact=True needs streams below {EXACT_RANGE:g}, got {value:g}: from here on the inversion is "
                "rounded as with exact=False. Lower the learning rate or use fewer couplings.",
                stacklevel=2,
            )


class AdditiveCoupling(nn.Module, Step):
    """A bijection of two equally shaped tensors, whatever `f` and `g` compute.

    forward: ``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``; inverse: ``x2 = y2 - g(y1)``, ``x1 = y1 - f(x2)``
    (Gomez et al. 2017, equations 6 and 7).

    Args:
        f, g: Modules that keep the shape of their input and do not change it in place.
        exact: Round what `f` and `g` return to multiples of 2^-12 (straight-through gradient). With inputs that
            are such multiples and values below 2^12, additions in float32 are exact and so is the inverse.

    Shape: two tensors (B, C, *spatial) -> two tensors (B, C, *spatial).

    Raises:
        ValueError: `f` or `g` changes the shape.
    """

    def __init__(self, f: nn.Module, g: nn.Module, exact: bool = False) -> None:
        super().__init__()
        self.f = f
        self.g = g
        self.exact = exact

    def forward(self, x1: Tensor, x2: Tensor, evaluate: Evaluate = evaluate) -> Halves:
        """Return ``(y1, y2)``."""
        y1 = x1 + self.finish(evaluate(self.f, x2), x2)
        y2 = x2 + self.finish(evaluate(self.g, y1), y1)
        return y1, y2

    def inverse(self, y1: Tensor, y2: Tensor) -> Halves:
        """Return ``(x1, x2)``."""
        x2 = y2 - self.finish(evaluate(self.g, y1), y1)
        x1 = y1 - self.finish(evaluate(self.f, x2), x2)
        return x1, x2

    def run(self, streams: Streams, forward: Pass) -> Streams:
        """Go one step on."""
        halves = self(*streams.halves, forward.evaluate)
        forward.note(*halves)
        return Streams(halves, streams.skips)

    def invert(self, streams: Streams) -> Streams:
        """Go one step back."""
        return Streams(self.inverse(*streams.halves), streams.skips)

    def walk_back(self, state: State, walk: Walk) -> None:
        """Recover x2, and pass the gradient of y2 on to y1; then x1, and the gradient of y1 to x2."""
        walk.undo(self.g, self.finish, state)
        walk.undo(self.f, self.finish, state, ends_step=True)

    def shifts(self) -> tuple[nn.Module, ...]:
        """Both, which are evaluated again."""
        return self.f, self.g

    def finish(self, shift: Tensor, given: Tensor) -> Tensor:
        """Check what `f` or `g` made of `given`, and round it in the exact mode, in the dtype of `given`."""
        if shift.shape != given.shape:
            raise ValueError(
                f"f and g of an AdditiveCoupling must keep the shape of their input, got {tuple(shift.shape)} "
                f"from {tuple(given.shape)}."
            )
        return rounded(shift.to(given.dtype)) if self.exact else shift
