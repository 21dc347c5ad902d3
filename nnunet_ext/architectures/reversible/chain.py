"""Chains of reversible steps whose backward pass recomputes every input instead of keeping it.

RevNet: Gomez et al. 2017, https://arxiv.org/abs/1707.04585; in U-Nets: Bruegger et al. 2019,
https://arxiv.org/abs/1906.06148, and over several levels Yamazaki et al. 2021, https://arxiv.org/abs/2103.09042. One
autograd function stands for the whole chain and keeps its output only; one function per step would need two more
forward passes. New against the papers: skips between levels are walked back too, and samples are recomputed in groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunet_ext.architectures.reversible.coupling import ExactRange
from nnunet_ext.architectures.reversible.mixed_precision import rounding_error
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

# Groups of samples are no smaller than so many of them need: each walks all steps, those of small feature maps too.
MOST_GROUPS = 4


# PyTorch before 2.12 takes the hash of a chain while it compiles, before there are fields: not one over the fields.
@dataclass(frozen=True, eq=False, kw_only=True)
class Chain:
    """Steps on a feature map, run so that training keeps the last one, and what steps without an inverse ask for.

    Under autocast the streams are float32 while one group of samples is walked, f and g of couplings see their input in
    autocast's dtype, and what is kept and given out has that dtype too, as in nnU-Net's own networks. Gradients equal
    plain autograd's up to the rounding of the inversion, and exactly in the exact mode, which keeps float32.

    Args:
        steps: Any `Step`s.
        enter: Leads from the input, which is kept, to the first feature map; None: the input is that.
        gives_last: Whether the last feature map is given out, and not only what taps and heads give.
        exact: Whether the couplings are exact.
        reversible: False lets plain autograd keep everything: same outputs, the reference.
        group_elements: Run the samples in groups of at most this many elements of the first feature map, but in no
            more than `MOST_GROUPS`, which lowers the peak of the backward pass. Only right where all modules treat
            samples independently: not with batch norm. None: all samples at once.
        channels: Of the first feature map; None: those of the input.
        exact_range: Checks the exact mode; shared by the chains of a network, which then waits once per step. None:
            nothing is checked.

    Raises:
        ValueError: odd number of channels; exact mode on a dtype other than float32 or float64.
        RuntimeError: f or g changes its input in place.
    """

    steps: Sequence[Step]
    enter: nn.Module | None = None
    gives_last: bool = True
    exact: bool = False
    reversible: bool = True
    group_elements: int | None = None
    channels: int | None = None
    exact_range: ExactRange | None = None

    @property
    def modules(self) -> list[nn.Module]:
        """All that is evaluated again in the backward pass."""
        entered = [] if self.enter is None else [self.enter]
        return [*entered, *(shift for step in self.steps for shift in step.shifts())]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run all steps: the last feature map where it is given, then what taps and heads give in their order."""
        if self.enter is None and x.shape[1] % 2:
            raise ValueError(
                f"A reversible chain needs an even number of channels, got {x.shape[1]} (shape {tuple(x.shape)})."
            )
        if self.reversible and can_recompute():
            return _recomputed(self, x)
        return tuple(self.advance(x, Pass(self.exact)))

    def advance(self, x: Tensor, forward: Pass, matrices: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """Run the steps; return what is given out. The last feature map is kept where it is not given.

        Args:
            x: Input, or a group of its samples.
            forward: How the steps evaluate.
            matrices: Orthogonal matrices of the steps; None: each step computes its own.
        """
        first = x if self.enter is None else forward.evaluate(self.enter, x)
        streams = Streams(forward.split(first))
        del first, x
        for i, step in enumerate(self.steps):
            forward.matrix = None if matrices is None else matrices[i]
            streams = step.run(streams, forward)
        if self.gives_last:
            return [forward.whole(streams.halves), *forward.taps]
        forward.anchor(streams.halves)
        return forward.taps

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x that the steps turn into y, for modules in evaluation mode or without running statistics."""
        forward = Pass(self.exact)
        streams = Streams(forward.split(y))
        for step in reversed(self.steps):
            streams = step.invert(streams)
        return forward.whole(streams.halves)

    def groups(self, x: Tensor) -> list[slice]:
        """Slices of the batch axis that are run one after the other."""
        size = max(1, len(x))
        if self.group_elements is not None:
            size = group_size(len(x), prod(x.shape[2:]) * (self.channels or x.shape[1]), self.group_elements)
        return [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]


def group_size(samples: int, per_sample: int, elements: int) -> int:
    """Samples of a group.

    Args:
        samples: In the batch.
        per_sample: Elements of the largest feature map of one.
        elements: Of a group at most, but no more than `MOST_GROUPS` groups and no less than one sample.
    """
    return max(1, elements // max(1, per_sample), -(-samples // MOST_GROUPS))


class _Remembered(Pass):
    """A forward pass that keeps of each evaluation only what a repeated one would not see.

    Args:
        chain: The chain.

    Attributes:
        seen: What each evaluation saw.
        kept: What the steps keep.
    """

    def __init__(self, chain: Chain) -> None:
        super().__init__(chain.exact)
        self._exact_range = chain.exact_range if chain.exact else None
        self.seen: list[Seen | None] = []
        self.kept: list[Tensor | None] = []

    def evaluate(self, module: nn.Module, *given: Tensor) -> Tensor:
        """Evaluate what the way back evaluates again.

        Raises:
            RuntimeError: it changes its input in place.
        """
        self.seen.append(Seen.by(module, given[0]))
        versions = [None if x.is_inference() else x._version for x in given]
        shift = super().evaluate(module, *given)
        if any(version is not None and x._version != version for x, version in zip(given, versions, strict=True)):
            raise RuntimeError(
                f"{type(module).__name__} changes its input in place; in a reversible sequence it must not: "
                "build it with inplace=False."
            )
        return shift

    def keep(self, *feature_maps: Tensor) -> None:
        """Keep them."""
        self.kept += feature_maps

    def anchor(self, halves: Halves) -> Tensor:
        """Keep it, and what its rounding loses."""
        x = super().anchor(halves)
        self.kept += [x, *map(rounding_error, halves, halves_of(x))]
        return x

    def note(self, first: Tensor, second: Tensor) -> None:
        """Watch the exact mode's range."""
        if self._exact_range is not None:
            self._exact_range.note(first, second)


# Dynamo can't trace the recomputation: a graph break here, and nowhere else.
@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _recomputed(chain: Chain, x: Tensor) -> tuple[Tensor, ...]:
    weights, matrices = Weights(chain.modules), [step.matrix() for step in chain.steps]
    outputs: tuple[Tensor, ...] = _Recomputed.apply(chain, weights.places, x, *matrices, *weights.tensors)
    return outputs


class _Recomputed(torch.autograd.Function):
    """The whole chain; matrices and parameters are explicit inputs, so that hooks, DDP and `autograd.grad` see them."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, places: Places, x: Tensor, *weights: Tensor | None) -> tuple[Tensor, ...]:
        ctx.chain, ctx.places = chain, places
        ctx.autocast = Autocast.now(x.device.type)
        ctx.modes = Modes(chain.modules)
        ctx.groups, ctx.seen, ctx.n_kept, ctx.dtype = chain.groups(x), [], [], x.dtype
        ctx.set_materialize_grads(False)
        x = x.detach()  # modules' own hooks (FLOP counters) would look for a graph behind views of x
        outputs: list[Tensor] = []
        kept: list[Tensor | None] = []
        with ctx.autocast.enter():
            for group in ctx.groups:
                forward = _Remembered(chain)
                found = chain.advance(x[group], forward, weights)
                outputs = _collected(outputs, found, group, len(x))
                kept += forward.kept
                ctx.seen.append(forward.seen)
                ctx.n_kept.append(len(forward.kept))
                del found, forward
        # The saved versions are compared in backward: an in-place change of output or weights is an error there.
        ctx.n_weights = len(weights)
        first, last = None if chain.enter is None else x, outputs[0] if chain.gives_last else None
        ctx.save_for_backward(first, last, *weights, *kept)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        if chain.exact_range is not None:
            chain.exact_range.look()
        x, y, *rest = ctx.saved_tensors
        weights, kept = rest[: ctx.n_weights], rest[ctx.n_weights :]
        _, _, x_needs_grad, *needs_grad = ctx.needs_input_grad
        leaves = Leaves(weights, needs_grad)
        walk = Walk(
            ctx.places,
            ctx.autocast,
            leaves,
            is_exact=chain.exact,
            first_needs_grad=x_needs_grad or chain.enter is not None,
        )
        grad_x: list[Tensor] = []
        for group, seen, n_kept in zip(ctx.groups, ctx.seen, ctx.n_kept, strict=True):
            ends = [None if gradient is None else gradient[group] for gradient in gradients]
            walk.kept, kept = kept[:n_kept], kept[n_kept:]
            end, d_end = ((y[group], None, None), ends.pop(0)) if chain.gives_last else (walk.anchor(), None)
            # What autocast does not lower, as float64, it leaves as it is.
            is_low = end[0].dtype == ctx.autocast.low and not chain.exact
            state = State(end, d_end, ctx.autocast.low if is_low else None)
            with ctx.modes.restored():
                walk.back(chain.steps, state, ends, seen)
                if chain.enter is None:
                    d_x = [state.take_gradient(ctx.dtype)]
                else:
                    d_x = walk.through(chain.enter, (x[group],), state.leave(), needed=x_needs_grad)
            if x_needs_grad:
                grad_x = _collected(grad_x, d_x, group, ctx.groups[-1].stop)
            del state, d_x
        return None, None, grad_x[0] if grad_x else None, *leaves.sums


def _collected(collected: list[Tensor], found: list[Tensor], group: slice, samples: int) -> list[Tensor]:
    """Results of all samples, with those of a group; where there is one group, what it found."""
    if len(found) and len(found[0]) == samples:
        return found
    collected = collected or [x.new_empty((samples, *x.shape[1:])) for x in found]
    for whole, x in zip(collected, found, strict=True):
        whole[group] = x
    return collected
