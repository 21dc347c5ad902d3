"""Chains of reversible steps whose backward pass recomputes every input instead of keeping it.

RevNet: Gomez et al. 2017, https://arxiv.org/abs/1707.04585; in U-Nets: Bruegger et al. 2019,
https://arxiv.org/abs/1906.06148, and over several levels Yamazaki et al. 2021, https://arxiv.org/abs/2103.09042. One
autograd function stands for the whole chain and keeps its output only; one function per step would need two more
forward passes. New against the papers: skips between levels are walked back too, and samples are recomputed in groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunet_ext.architectures.reversible.coupling import ExactRange, RoundStraightThrough
from nnunet_ext.architectures.reversible.recomputation import (
    Autocast,
    Leaves,
    Modes,
    Places,
    Seen,
    Weights,
    can_recompute,
)
from nnunet_ext.architectures.reversible.steps import Halves, Pass, Step, Streams, halves_of
from nnunet_ext.architectures.reversible.walk import State, Walk


# PyTorch before 2.12 takes the hash of a chain while it compiles, before there are fields: not one over the fields.
@dataclass(frozen=True, eq=False, kw_only=True)
class Chain:
    """Steps on a feature map, run so that training keeps the output only, and what taps give out.

    Under autocast f and g of couplings see their input in its dtype, as in nnU-Net's own networks, while the streams
    stay float32. Gradients equal plain autograd's up to the rounding of the inversion, and exactly in the exact mode.

    Args:
        steps: Any `Step`s; the last feature map has the shape of the first.
        exact: Whether the couplings are exact.
        reversible: False lets plain autograd keep everything: same outputs, the reference.
        group_elements: Run the samples in groups of at most this many elements of the input (at least one sample),
            which lowers the peak of the backward pass. Only right where all modules treat samples independently:
            not with batch norm. None: all samples at once.
        exact_range: Checks the exact mode; shared by the chains of a network, which then waits once per step. None:
            nothing is checked.

    Raises:
        ValueError: odd number of channels; exact mode on a dtype other than float32 or float64.
        RuntimeError: f or g changes its input in place.
    """

    steps: Sequence[Step]
    exact: bool = False
    reversible: bool = True
    group_elements: int | None = None
    exact_range: ExactRange | None = None

    @property
    def weights(self) -> Weights:
        """Parameters of all that is evaluated again in the backward pass."""
        return Weights(shift for step in self.steps for shift in step.shifts())

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run all steps: the last feature map, then those of the taps in their order."""
        x = self.stream(x)
        if self.reversible and can_recompute():
            return _recomputed(self, x)
        return tuple(torch.cat(halves, dim=1) for halves in self.advance(x, Pass()))

    def advance(self, x: Tensor, forward: Pass, matrices: Sequence[Tensor | None] | None = None) -> list[Halves]:
        """Run the steps: halves of the last feature map, then of the taps.

        Args:
            x: Feature map as `stream` gives it.
            forward: How the steps evaluate.
            matrices: Orthogonal matrices of the steps; None: each step computes its own.
        """
        streams = Streams(halves_of(x))
        for i, step in enumerate(self.steps):
            forward.matrix = None if matrices is None else matrices[i]
            streams = step.run(streams, forward)
        return [streams.halves, *forward.taps]

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x that the steps turn into y, for modules in evaluation mode or without running statistics."""
        streams = Streams(halves_of(self.stream(y)))
        for step in reversed(self.steps):
            streams = step.invert(streams)
        return torch.cat(streams.halves, dim=1)

    def stream(self, x: Tensor) -> Tensor:
        """Check the input and give it the precision of the streams."""
        if x.shape[1] % 2:
            raise ValueError(
                f"A reversible chain needs an even number of channels, got {x.shape[1]} (shape {tuple(x.shape)})."
            )
        if torch.is_autocast_enabled(x.device.type) and x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        if not self.exact:
            return x
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"exact=True needs streams in float32 or float64, got {x.dtype}: use autocast instead.")
        return RoundStraightThrough.apply(x)

    def groups(self, x: Tensor) -> list[slice]:
        """Slices of the batch axis that are run one after the other."""
        per_sample = max(1, x[0].numel()) if len(x) else 1
        size = len(x) if self.group_elements is None else max(1, self.group_elements // per_sample)
        return [slice(start, start + size) for start in range(0, len(x), max(1, size))]


class _Remembered(Pass):
    """A forward pass that keeps of each evaluation only what a repeated one would not see.

    Args:
        exact_range: Looks at what couplings give; None: nothing does.
    """

    def __init__(self, exact_range: ExactRange | None) -> None:
        super().__init__()
        self._exact_range = exact_range
        self.seen: list[Seen | None] = []

    def evaluate(self, module: nn.Module, given: Tensor) -> Tensor:
        """Evaluate f or g of a coupling.

        Raises:
            RuntimeError: it changes its input in place.
        """
        self.seen.append(Seen.by(module, given))
        version = None if given.is_inference() else given._version
        shift = super().evaluate(module, given)
        if version is not None and given._version != version:
            raise RuntimeError(
                f"{type(module).__name__} changes its input in place; in a reversible sequence it must not: "
                "build it with inplace=False."
            )
        return shift

    def note(self, first: Tensor, second: Tensor) -> None:
        """Watch the exact mode's range."""
        if self._exact_range is not None:
            self._exact_range.note(first, second)


# Dynamo can't trace the recomputation: a graph break here, and nowhere else.
@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _recomputed(chain: Chain, x: Tensor) -> tuple[Tensor, ...]:
    weights, matrices = chain.weights, [step.matrix() for step in chain.steps]
    outputs: tuple[Tensor, ...] = _Recomputed.apply(chain, weights.places, x, *matrices, *weights.tensors)
    return outputs


class _Recomputed(torch.autograd.Function):
    """The whole chain; matrices and parameters are explicit inputs, so that hooks, DDP and `autograd.grad` see them."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, places: Places, x: Tensor, *weights: Tensor | None) -> tuple[Tensor, ...]:
        ctx.chain, ctx.places = chain, places
        ctx.autocast = Autocast.now(x.device.type)
        ctx.modes = Modes(chain.steps)
        ctx.seen = []
        ctx.set_materialize_grads(False)
        x = x.detach()  # modules' own hooks (FLOP counters) would look for a graph behind views of x
        outputs = [torch.empty_like(x)]
        with ctx.autocast.enter():
            for group in chain.groups(x):
                forward = _Remembered(chain.exact_range if chain.exact else None)
                found = chain.advance(x[group], forward, weights)
                ctx.seen.append(forward.seen)
                for i, halves in enumerate(found):
                    if i == len(outputs):
                        outputs.append(_empty(halves, len(x)))
                    _write(halves, outputs[i][group])
                del found, halves, forward
        # The saved versions are compared in backward: an in-place change of output or weights is an error there.
        ctx.save_for_backward(outputs[0], *weights)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *grad_taps: Tensor | None) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        if chain.exact_range is not None:
            chain.exact_range.look()
        y, *weights = ctx.saved_tensors
        _, _, x_needs_grad, *needs_grad = ctx.needs_input_grad
        leaves = Leaves(weights, needs_grad)
        walk = Walk(ctx.places, ctx.autocast, leaves, x_needs_grad)
        grad_y = torch.zeros_like(y) if grad_y is None else grad_y
        groups = chain.groups(y)
        # A few large groups are joined after all work is done; many small ones at once, instead of twice at the end.
        join_late = len(groups) <= 3
        pieces: list[Tensor] = []
        grad_x = torch.empty_like(grad_y) if x_needs_grad and not join_late else None
        for group, seen in zip(groups, ctx.seen, strict=True):
            state = State.at(y[group], grad_y[group])
            taps = [None if grad is None else grad[group] for grad in grad_taps]
            with ctx.modes.restored():
                walk.back(chain.steps, state, taps, seen)
            if grad_x is not None:
                torch.cat((state.d_given, state.d_result), dim=1, out=grad_x[group])
            elif x_needs_grad:
                pieces.append(torch.cat((state.d_given, state.d_result), dim=1))
            del state
        if pieces:
            grad_x = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return None, None, grad_x, *leaves.sums


def _empty(halves: Halves, samples: int) -> Tensor:
    """Room for a tap of all samples."""
    first, second = halves
    return first.new_empty((samples, first.shape[1] + second.shape[1], *first.shape[2:]))


def _write(halves: Halves, target: Tensor) -> None:
    for half, place in zip(halves, target.chunk(2, dim=1), strict=True):
        place.copy_(half)
