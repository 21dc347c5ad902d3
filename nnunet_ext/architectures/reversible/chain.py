"""Chains of reversible steps whose backward pass recomputes every input instead of keeping it.

RevNet: Gomez et al. 2017, https://arxiv.org/abs/1707.04585; in U-Nets: Bruegger et al. 2019,
https://arxiv.org/abs/1906.06148, and over several levels Yamazaki et al. 2021, https://arxiv.org/abs/2103.09042. One
autograd function stands for the whole chain and keeps its output only; one function per step would need two more
forward passes. New against the papers: skips between levels are walked back too, and samples are recomputed in groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunet_ext.architectures.reversible.coupling import AdditiveCoupling, ExactRange, RoundStraightThrough
from nnunet_ext.architectures.reversible.levels import Ascend, Descend, Halves, Streams, Tap, join, part
from nnunet_ext.architectures.reversible.mixed_precision import lowered
from nnunet_ext.architectures.reversible.recomputation import (
    Autocast,
    Leaves,
    Modes,
    Places,
    Seed,
    Seen,
    Weights,
    can_recompute,
    recompute,
)


# PyTorch before 2.12 takes the hash of a chain while it compiles, before there are fields: not one over the fields.
@dataclass(frozen=True, eq=False)
class Chain:
    """Steps on a feature map, run so that training keeps the output only, and what taps give out.

    Under autocast f and g of couplings see their input in its dtype, as in nnU-Net's own networks, while the streams
    stay float32. Gradients equal plain autograd's up to the rounding of the inversion, and exactly in the exact mode.

    Args:
        steps: `AdditiveCoupling`, `Descend`, `Ascend` and `Tap`; the last feature map has the shape of the first.
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

    steps: Sequence[nn.Module]
    exact: bool = False
    reversible: bool = True
    group_elements: int | None = None
    exact_range: ExactRange | None = None

    @property
    def weights(self) -> Weights:
        """Parameters of all couplings."""
        couplings = [step for step in self.steps if isinstance(step, AdditiveCoupling)]
        return Weights(shift for coupling in couplings for shift in (coupling.f, coupling.g))

    @property
    def matrices(self) -> list[Tensor | None]:
        """The orthogonal matrix of each step, None where it has none: computed anew, so once per training step."""
        return [step.squeeze.matrix() if isinstance(step, (Descend, Ascend)) else None for step in self.steps]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run all steps: the last feature map, then those of the taps in their order."""
        x = self.stream(x)
        if self.reversible and can_recompute():
            return _recomputed(self, x)
        streams, taps = Streams(_chunk(x)), []
        for step in self.steps:
            streams = _forward(step, streams)
            if isinstance(step, Tap):
                taps.append(torch.cat(streams.halves, dim=1))
        return (torch.cat(streams.halves, dim=1), *taps)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x that the steps turn into y, for modules in evaluation mode or without running statistics."""
        streams = Streams(_chunk(self.stream(y)))
        for step in reversed(self.steps):
            if isinstance(step, AdditiveCoupling):
                streams = Streams(step.inverse(*streams.halves), streams.skips)
            else:
                streams = step.inverse(streams)  # type: ignore[operator]
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
            raise ValueError(
                f"exact=True needs streams in float32 or float64, got {x.dtype}: use autocast instead."
            )
        return RoundStraightThrough.apply(x)

    def groups(self, x: Tensor) -> list[slice]:
        """Slices of the batch axis that are run one after the other."""
        per_sample = max(1, x[0].numel()) if len(x) else 1
        size = len(x) if self.group_elements is None else max(1, self.group_elements // per_sample)
        return [slice(start, start + size) for start in range(0, len(x), max(1, size))]


def _chunk(x: Tensor) -> Halves:
    first, second = x.chunk(2, dim=1)
    return first, second


def _forward(step: nn.Module, streams: Streams) -> Streams:
    if isinstance(step, AdditiveCoupling):
        return Streams(step(*streams.halves), streams.skips)
    result: Streams = step(streams)
    return result


# Dynamo can't trace the recomputation: a graph break here, and nowhere else.
@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _recomputed(chain: Chain, x: Tensor) -> tuple[Tensor, ...]:
    weights = chain.weights
    outputs: tuple[Tensor, ...] = _Recomputed.apply(
        chain, weights.places, x, *chain.matrices, *weights.tensors
    )
    return outputs


class _Recomputed(torch.autograd.Function):
    """The whole chain; matrices and parameters are explicit inputs, so that hooks, DDP and `autograd.grad` see them."""

    @staticmethod
    def forward(
        ctx: Any, chain: Chain, places: Places, x: Tensor, *weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.chain, ctx.places = chain, places
        ctx.autocast = Autocast.now(x.device.type)
        ctx.modes = Modes(chain.steps)
        ctx.seen = {}
        ctx.set_materialize_grads(False)
        x = x.detach()  # modules' own hooks (FLOP counters) would look for a graph behind views of x
        outputs = [torch.empty_like(x)]
        with ctx.autocast.enter():
            for group in chain.groups(x):
                found = _advance(ctx, chain, weights, group.start, x[group])
                for i, halves in enumerate(found):
                    if i == len(outputs):
                        outputs.append(_empty(halves, len(x)))
                    _write(halves, outputs[i][group])
                del found, halves
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
        walk = _Walk(ctx.seen, ctx.places, ctx.autocast, leaves, x_needs_grad, len(chain.steps))
        grad_y = torch.zeros_like(y) if grad_y is None else grad_y
        groups = chain.groups(y)
        # A few large groups are joined after all work is done; many small ones at once, instead of twice at the end.
        join_late = len(groups) <= 3
        pieces: list[Tensor] = []
        grad_x = torch.empty_like(grad_y) if x_needs_grad and not join_late else None
        for group in groups:
            state = _State(*_chunk(y[group]), *_chunk(grad_y[group]), [])
            taps = [None if grad is None else grad[group] for grad in grad_taps]
            with ctx.modes.restored():
                walk.back(chain.steps, state, taps, group.start)
            if grad_x is not None:
                torch.cat((state.d_given, state.d_result), dim=1, out=grad_x[group])
            elif x_needs_grad:
                pieces.append(torch.cat((state.d_given, state.d_result), dim=1))
            del state
        if pieces:
            grad_x = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return None, None, grad_x, *leaves.sums


def _advance(ctx: Any, chain: Chain, weights: Sequence[Tensor | None], start: int, x: Tensor) -> list[Halves]:
    """Run the steps on a group of samples: halves of the last feature map, then of the taps."""
    streams, taps = Streams(_chunk(x)), []
    for i, step in enumerate(chain.steps):
        if isinstance(step, AdditiveCoupling):
            first, second = streams.halves
            streams = Streams((first, second), streams.skips)
            first = first + _run(ctx, (start, i, "f"), step, step.f, second)
            second = second + _run(ctx, (start, i, "g"), step, step.g, first)
            streams = Streams((first, second), streams.skips)
            if chain.exact and chain.exact_range is not None:
                chain.exact_range.note(first, second)
            del first, second
        elif isinstance(step, Tap):
            taps.append(streams.halves)
        else:
            streams = step(streams, weights[i])
    return [streams.halves, *taps]


def _empty(halves: Halves, samples: int) -> Tensor:
    """Room for a tap of all samples."""
    first, second = halves
    return first.new_empty((samples, first.shape[1] + second.shape[1], *first.shape[2:]))


def _write(halves: Halves, target: Tensor) -> None:
    for half, place in zip(halves, target.chunk(2, dim=1), strict=True):
        place.copy_(half)


@dataclass
class _State:
    """Where the walk back stands: ``result = other + module(given)``, and the gradients of both.

    Between couplings `given` and `result` are the first and the second half. Holds the only references, so that a
    stream is freed as soon as the one before it is known.
    """

    given: Tensor
    result: Tensor
    d_given: Tensor
    d_result: Tensor
    skips: list[tuple[Halves, Halves]]  # and their gradients

    def swap(self) -> None:
        """The two streams change their roles."""
        self.given, self.result = self.result, self.given
        self.d_given, self.d_result = self.d_result, self.d_given

    def part(self, channels: int) -> tuple[Tensor, Tensor]:
        """Take channels and their gradient off; the rest becomes a skip."""
        taken, rest = part((self.given, self.result), channels)
        d_taken, d_rest = part((self.d_given, self.d_result), channels)
        self.skips.append((rest, d_rest))
        return taken, d_taken

    def join(self, taken: Tensor, d_taken: Tensor) -> None:
        """Put channels and their gradient back to the last skip."""
        rest, d_rest = self.skips.pop()
        self.given, self.result = join(taken, rest)
        self.d_given, self.d_result = join(d_taken, d_rest)

    def whole(self) -> tuple[Tensor, Tensor]:
        """The feature map and its gradient."""
        return torch.cat((self.given, self.result), dim=1), torch.cat((self.d_given, self.d_result), dim=1)

    def set(self, x: Tensor, d_x: Tensor) -> None:
        """Replace the feature map and its gradient."""
        (self.given, self.result), (self.d_given, self.d_result) = _chunk(x), _chunk(d_x)


@dataclass(frozen=True, eq=False)
class _Walk:
    """The way back through a chain.

    Args:
        seen: What modules saw in the forward pass, by (start of the group, step, half).
        places: Places of the parameters, by module.
        autocast: State of autocast in the forward pass.
        leaves: Matrices of the steps, then parameters.
        x_needs_grad: Whether the chain's input does.
        n_steps: Number of steps of the chain.
    """

    seen: dict[tuple[int, int, str], Seen]
    places: Places
    autocast: Autocast
    leaves: Leaves
    x_needs_grad: bool
    n_steps: int

    def back(self, steps: Sequence[nn.Module], state: _State, taps: list[Tensor | None], start: int) -> None:
        """Walk one group of samples back to the chain's input."""
        for i, step in reversed(list(enumerate(steps))):
            if isinstance(step, AdditiveCoupling):
                # y2 = x2 + g(y1): recover x2, and pass the gradient of y2 on to y1
                self._undo((start, i, "g"), step, step.g, state, True)
                # y1 = x1 + f(x2): recover x1, and pass the gradient of y1 on to x2
                self._undo((start, i, "f"), step, step.f, state, i > 0 or self.x_needs_grad)
            elif isinstance(step, Tap):
                gradient = taps.pop()
                if gradient is not None:
                    first, second = _chunk(gradient)
                    state.d_given, state.d_result = state.d_given + first, state.d_result + second
            elif isinstance(step, Descend):
                y, d_y = state.whole()
                with torch.no_grad():
                    x = step.squeeze.inverse(y, self.leaves.tensors[i])
                state.join(x, self._pull(step.squeeze.forward, x, d_y, i))
            elif isinstance(step, Ascend):
                y, d_y = state.part(step.squeeze.channels)
                with torch.no_grad():
                    x = step.squeeze(y, self.leaves.tensors[i])
                state.set(x, self._pull(step.squeeze.inverse, x, d_y, i))

    def _pull(self, map_: Callable[..., Tensor], x: Tensor, d_y: Tensor, step: int) -> Tensor:
        """Gradient of x for ``y = map_(x, matrix)``; that of the step's matrix is added up."""
        wanted = self.leaves.wanted([step])
        with torch.enable_grad():
            source = x.detach().requires_grad_()
            y = map_(source.view_as(source), self.leaves.tensors[step])
        d_x, *found = torch.autograd.grad(y, [source, *wanted.values()], d_y)
        self.leaves.add(wanted, found)
        return d_x

    def _undo(
        self,
        key: tuple[int, int, str],
        coupling: AdditiveCoupling,
        module: nn.Module,
        state: _State,
        further: bool,
    ) -> None:
        """Invert one half, ``other = result - module(given)``, and pass the gradient of `result` on to `given`.

        `further` is False where nothing needs the gradient of `given` any more. Nothing is changed in place: the
        tensors of `state` may be views of what the caller holds.
        """
        places = [(held, name, self.n_steps + i) for held, name, i in self.places[module]]
        weights = [(held, name, self.leaves.tensors[i]) for held, name, i in places]
        with torch.enable_grad(), self.autocast.enter():
            source = state.given.detach().requires_grad_(further)
            # A view, because hooks of modules (FLOP counters) can't follow a leaf within autograd.grad.
            shift = recompute(module, lowered(source.view_as(source)), self.seen.get(key), weights)
        with torch.no_grad():
            state.result = state.result - coupling.finish(shift, source)
        wanted = self.leaves.wanted(i for _, _, i in places)
        inputs = [source, *wanted.values()] if further else list(wanted.values())
        if inputs and shift.requires_grad:
            with torch.enable_grad():
                seed = Seed.apply(shift, state.d_result.to(shift.dtype))
            del shift
            found = list(torch.autograd.grad(seed, inputs, allow_unused=True))
            d_source = found.pop(0) if further else None
            if d_source is not None:
                state.d_given = state.d_given + d_source
            self.leaves.add(wanted, found)
        state.swap()


def _run(
    ctx: Any, key: tuple[int, int, str], coupling: AdditiveCoupling, module: nn.Module, given: Tensor
) -> Tensor:
    """Evaluate one half in the forward pass; remember what a repeated evaluation needs."""
    seen = Seen.by(module, given)
    if seen is not None:
        ctx.seen[key] = seen
    version = None if given.is_inference() else given._version
    shift = module(lowered(given))
    if version is not None and given._version != version:
        raise RuntimeError(
            f"{type(module).__name__} changes its input in place; in a reversible sequence it must not: "
            "build it with inplace=False."
        )
    return coupling.finish(shift, given)
