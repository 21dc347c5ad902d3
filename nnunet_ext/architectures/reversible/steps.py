"""What the steps of a reversible chain have in common: what lives between them, and their three verbs.

The feature map is a pair of halves of its channels, as couplings take it. Levels above leave skips behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nnunet_ext.architectures.reversible.mixed_precision import lowered

if TYPE_CHECKING:
    from nnunet_ext.architectures.reversible.walk import State, Walk

Halves = tuple[Tensor, Tensor]
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
        skips: What the levels above left behind, finest first, as halves.
    """

    halves: Halves
    skips: tuple[Halves, ...] = ()


def evaluate(module: nn.Module, given: Tensor) -> Tensor:
    """Evaluate f or g of a coupling in the dtype of autocast, as nnU-Net's own networks see their input."""
    result: Tensor = module(lowered(given))
    return result


class Pass:
    """A forward pass through a chain, of which plain autograd keeps everything.

    Attributes:
        taps: Feature maps that were given out so far.
        matrix: Orthogonal matrix of the present step; None: the step computes it.
    """

    def __init__(self) -> None:
        self.taps: list[Halves] = []
        self.matrix: Tensor | None = None

    def evaluate(self, module: nn.Module, given: Tensor) -> Tensor:
        """Evaluate f or g of a coupling."""
        return evaluate(module, given)

    def note(self, first: Tensor, second: Tensor) -> None:
        """Look at what a coupling gives."""


class Step(nn.Module):
    """A bijection of streams: one step of a chain.

    A new kind of step needs `run`, `invert` and `walk_back`, and nothing in the chain.
    """

    def run(self, streams: Streams, forward: Pass) -> Streams:
        """Go one step on."""
        raise NotImplementedError

    def invert(self, streams: Streams) -> Streams:
        """Go one step back, for modules in evaluation mode or without running statistics."""
        raise NotImplementedError

    def walk_back(self, state: State, walk: Walk) -> None:
        """Go one step back in the backward pass: recompute the input and pass the gradients on."""
        raise NotImplementedError

    def shifts(self) -> tuple[nn.Module, ...]:
        """Modules that are evaluated again in the backward pass."""
        return ()

    def matrix(self) -> Tensor | None:
        """Orthogonal matrix of the step: computed at each call, so once per training step."""
        return None


class Tap(Step):
    """Give the feature map out of the chain, for a head; the chain goes on with it unchanged."""

    def run(self, streams: Streams, forward: Pass) -> Streams:
        """Note the feature map."""
        forward.taps.append(streams.halves)
        return streams

    def invert(self, streams: Streams) -> Streams:
        """Change nothing."""
        return streams

    def walk_back(self, state: State, walk: Walk) -> None:
        """Add the gradient of what was given out."""
        gradient = walk.taps.pop()
        if gradient is not None:
            first, second = halves_of(gradient)
            state.d_given, state.d_result = state.d_given + first, state.d_result + second
