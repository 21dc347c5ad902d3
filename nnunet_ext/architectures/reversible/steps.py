"""What the steps of a reversible chain have in common: what lives between them, and their three verbs.

The feature map is a pair of halves of its channels, as couplings take it. Levels above leave skips behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nnunet_ext.architectures.reversible.mixed_precision import lowered, widened

if TYPE_CHECKING:
    from nnunet_ext.architectures.reversible.walk import State, Walk

Halves = tuple[Tensor, Tensor]
Skip = tuple[Tensor, ...]  # what one level leaves behind: a whole feature map, or halves of some of its channels
Evaluate = Callable[[nn.Module, Tensor], Tensor]


def halves_of(x: Tensor) -> Halves:
    """Both halves of the channels, as views."""
    first, second = x.chunk(2, dim=1)
    return first, second


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


@dataclass(frozen=True, eq=False)
class Streams:
    """What lives between two steps.

    Args:
        halves: Two halves of the channels of the feature map.
        skips: What the levels above left behind, finest first.
    """

    halves: Halves
    skips: tuple[Skip, ...] = ()


def evaluate(module: nn.Module, *given: Tensor) -> Tensor:
    """Evaluate a module in the dtype of autocast, as nnU-Net's own networks see their input."""
    result: Tensor = module(*map(lowered, given))
    return result


class Pass:
    """A forward pass through a chain, of which plain autograd keeps everything.

    Args:
        is_exact: Whether the streams are multiples of the exact mode's step, and nothing of them may be lowered.

    Attributes:
        taps: What was given out so far: feature maps and logits.
        matrix: Orthogonal matrix of the present step; None: the step computes it.
    """

    def __init__(self, is_exact: bool = False) -> None:
        self.is_exact = is_exact
        self.taps: list[Tensor] = []
        self.matrix: Tensor | None = None

    def evaluate(self, module: nn.Module, *given: Tensor) -> Tensor:
        """Evaluate what the way back evaluates again."""
        return evaluate(module, *given)

    def note(self, first: Tensor, second: Tensor) -> None:
        """Look at what a coupling gives."""

    def keep(self, *feature_maps: Tensor) -> None:
        """Keep what the way back can't recompute."""

    def anchor(self, halves: Halves) -> Tensor:
        """Return the whole feature map, and keep it so that the way back can start from it."""
        return self.whole(halves)

    def split(self, x: Tensor) -> Halves:
        """Streams of a feature map: its halves, in float32 under autocast, rounded in the exact mode."""
        first, second = (widened(half) for half in halves_of(x))
        return (rounded(first), rounded(second)) if self.is_exact else (first, second)

    def whole(self, halves: Halves) -> Tensor:
        """A feature map as it is kept and handed on: in the dtype of autocast, but in the exact mode."""
        return torch.cat(halves if self.is_exact else [lowered(half) for half in halves], dim=1)


class Step:
    """One step of a chain: a bijection of streams, or one whose input is kept (`transitions`).

    A new kind of step needs `run`, `walk_back` and, where it has an inverse, `invert`, and nothing in the chain.
    """

    def run(self, streams: Streams, forward: Pass) -> Streams:
        """Go one step on."""
        raise NotImplementedError

    def invert(self, streams: Streams) -> Streams:
        """Go one step back, for modules in evaluation mode or without running statistics."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse: use the chain without it.")

    def walk_back(self, state: State, walk: Walk) -> None:
        """Go one step back in the backward pass: find the input and pass the gradients on."""
        raise NotImplementedError

    def shifts(self) -> tuple[nn.Module, ...]:
        """Modules that are evaluated again in the backward pass."""
        return ()

    def matrix(self) -> Tensor | None:
        """Orthogonal matrix of the step: computed at each call, so once per training step."""
        return None


EXACT_STEP = 2.0**-12


class RoundStraightThrough(torch.autograd.Function):
    """Round to multiples of `EXACT_STEP`; the gradient passes unchanged."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Round."""
        return torch.round(x / EXACT_STEP) * EXACT_STEP  # powers of two: both scalings are exact

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        """Pass the gradient on."""
        return grad


def rounded(x: Tensor) -> Tensor:
    """`x` as a stream of the exact mode.

    Raises:
        ValueError: a dtype other than float32 or float64.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"exact=True needs streams in float32 or float64, got {x.dtype}: use autocast instead.")
    result: Tensor = RoundStraightThrough.apply(x)
    return result
