"""Sequences of additive couplings whose backward pass recomputes its inputs instead of keeping them.

RevNet: Gomez et al. 2017, https://arxiv.org/abs/1707.04585; in U-Nets: Bruegger et al. 2019,
https://arxiv.org/abs/1906.06148. One autograd function stands for the whole sequence and keeps its output only;
one function per coupling would need two more forward passes. New against the papers: the exact mode, and
recomputation in groups of samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils.checkpoint import get_device_states, set_device_states

from nnunet_ext.architectures.blocks.mixed_precision import lowered

EXACT_STEP = 2.0**-12
EXACT_RANGE = 2.0**12


class _RoundStraightThrough(torch.autograd.Function):
    """Round to multiples of `EXACT_STEP`; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x / EXACT_STEP) * EXACT_STEP  # powers of two: both scalings are exact

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class AdditiveCoupling(nn.Module):
    """A bijection of two equally shaped tensors, whatever `f` and `g` compute.

    forward: ``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``; inverse: ``x2 = y2 - g(y1)``, ``x1 = y1 - f(x2)``
    (Gomez et al. 2017, equations 6 and 7).

    Args:
        f, g: modules that keep the shape of their input and do not change it in place.
        exact: round what `f` and `g` return to multiples of 2^-12 (straight-through gradient). With inputs that
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

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(y1, y2)``."""
        y1 = x1 + self.finish(self.f(lowered(x2)), x2)
        y2 = x2 + self.finish(self.g(lowered(y1)), y1)
        return y1, y2

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(x1, x2)``."""
        x2 = y2 - self.finish(self.g(lowered(y1)), y1)
        x1 = y1 - self.finish(self.f(lowered(x2)), x2)
        return x1, x2

    def finish(self, shift: Tensor, given: Tensor) -> Tensor:
        """Check what `f` or `g` made of `given`, and round it in the exact mode, in the dtype of `given`."""
        if shift.shape != given.shape:
            raise ValueError(
                f"f and g of an AdditiveCoupling must keep the shape of their input, got {tuple(shift.shape)} "
                f"from {tuple(given.shape)}."
            )
        return _RoundStraightThrough.apply(shift.to(given.dtype)) if self.exact else shift


class ReversibleSequence(nn.Module):
    """Additive couplings on the two halves of the channels, with activation memory constant in depth.

    In training only the output is kept; the backward pass recomputes the input of each coupling from its output
    (one more evaluation of every `f` and `g`: 4/3 of the FLOPs of plain autograd). Under autocast `f` and `g` see
    their input in its dtype, as in nnU-Net's own networks, while the two streams stay float32. Gradients equal plain
    autograd's up to the rounding of the inversion, and exactly in the exact mode
    (`tests/architectures/test_reversible.py`).

    Args:
        couplings: at least one; all of them exact or none.
        reversible: False lets plain autograd keep everything: same weights, same outputs, the reference.
        group_elements: run the samples in groups of at most this many elements of the input (at least one sample),
            which lowers the peak of the backward pass. Only right where `f` and `g` treat samples independently:
            not with batch norm. None: all samples at once.

    Shape: (B, C, *spatial) -> (B, C, *spatial), C even.

    Raises:
        ValueError: odd number of channels; exact mode on a dtype other than float32 or float64.
        RuntimeError: `f` or `g` changes its input in place.
    """

    def __init__(
        self,
        couplings: Iterable[AdditiveCoupling],
        *,
        reversible: bool = True,
        group_elements: int | None = None,
    ) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(couplings)
        self.reversible = reversible
        self.group_elements = group_elements
        modes = {coupling.exact for coupling in self._couplings()}
        if len(modes) != 1:
            raise ValueError(
                f"A ReversibleSequence needs couplings that are all exact or all not, got {modes}."
            )
        self.exact = modes.pop()

    def forward(self, x: Tensor) -> Tensor:
        """Run all couplings."""
        x = self._stream(x)
        if self.reversible and torch.is_grad_enabled() and self._needs_grad(x):
            return self._recomputed(x)
        x1, x2 = x.chunk(2, dim=1)
        for coupling in self._couplings():
            x1, x2 = coupling(x1, x2)
        return torch.cat((x1, x2), dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x with ``forward(x) == y``, for a module in evaluation mode or without running statistics."""
        y1, y2 = self._stream(y).chunk(2, dim=1)
        for coupling in reversed(list(self._couplings())):
            y1, y2 = coupling.inverse(y1, y2)
        return torch.cat((y1, y2), dim=1)

    def _couplings(self) -> Iterator[AdditiveCoupling]:
        yield from self.couplings  # type: ignore[misc]

    def _stream(self, x: Tensor) -> Tensor:
        """Check the input and give it the precision of the streams."""
        if x.shape[1] % 2:
            raise ValueError(
                f"A ReversibleSequence needs an even number of channels, got {x.shape[1]} (shape {tuple(x.shape)})."
            )
        if torch.is_autocast_enabled(x.device.type) and x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        if not self.exact:
            return x
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"exact=True needs streams in float32 or float64, got {x.dtype}: use autocast instead."
            )
        return _RoundStraightThrough.apply(x)

    def _needs_grad(self, x: Tensor) -> bool:
        return x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())

    def groups(self, x: Tensor) -> list[slice]:
        """Slices of the batch axis that are run one after the other."""
        per_sample = max(1, x[0].numel()) if len(x) else 1
        size = len(x) if self.group_elements is None else max(1, self.group_elements // per_sample)
        return [slice(start, start + size) for start in range(0, len(x), max(1, size))]

    # Dynamo can't trace the recomputation: a graph break here, and nowhere else.
    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def _recomputed(self, x: Tensor) -> Tensor:
        return _Recomputed.apply(self, x, *self.parameters())


@dataclass(frozen=True)
class _Autocast:
    """The state of autocast in the forward pass; nnU-Net calls backward outside of it."""

    device_type: str
    enabled: bool
    dtype: torch.dtype | None

    @classmethod
    def now(cls, device_type: str) -> _Autocast:
        if not torch.amp.is_autocast_available(device_type):
            return cls(device_type, False, None)
        enabled = torch.is_autocast_enabled(device_type)
        return cls(device_type, enabled, torch.get_autocast_dtype(device_type))

    def enter(self) -> AbstractContextManager[Any]:
        """Re-enter it, without its cache of cast weights: what is cached without gradients would lose them."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@dataclass(frozen=True)
class _RandomState:
    """States of the random generators that one half of a coupling consumed in the forward pass."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def now(cls, x: Tensor) -> _RandomState:
        return cls(torch.get_rng_state(), *get_device_states(x))

    def differs(self, other: _RandomState) -> bool:
        pairs = zip((self.cpu, *self.states), (other.cpu, *other.states), strict=True)
        return any(mine.numpy().tobytes() != theirs.numpy().tobytes() for mine, theirs in pairs)

    def restore(self, device_type: str) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states, device_type=device_type)


class _Recomputed(torch.autograd.Function):
    """The whole sequence; the parameters are explicit inputs, so that hooks, DDP and `autograd.grad` see them."""

    @staticmethod
    def forward(ctx: Any, sequence: ReversibleSequence, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.sequence = sequence
        ctx.autocast = _Autocast.now(x.device.type)
        ctx.random = {}
        x = x.detach()  # modules' own hooks (FLOP counters) would look for a graph behind views of x
        y = torch.empty_like(x)
        largest = x.new_zeros(())
        with ctx.autocast.enter():
            for group in sequence.groups(x):
                x1, x2 = x[group].chunk(2, dim=1)
                for i, coupling in enumerate(sequence._couplings()):
                    x1 = x1 + _run(ctx, (group.start, i, "f"), coupling, coupling.f, x2)
                    x2 = x2 + _run(ctx, (group.start, i, "g"), coupling, coupling.g, x1)
                    if sequence.exact:
                        largest = torch.stack((largest, x1.abs().amax(), x2.abs().amax())).amax()
                y1, y2 = y[group].chunk(2, dim=1)
                y1.copy_(x1)
                y2.copy_(x2)
        _warn_beyond_exact_range(largest)
        # The saved versions are compared in backward: an in-place change of output or weights is an error there.
        ctx.save_for_backward(y, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        sequence: ReversibleSequence = ctx.sequence
        y, *parameters = ctx.saved_tensors
        _, x_needs_grad, *needs_grad = ctx.needs_input_grad
        wanted = [p for p, needed in zip(parameters, needs_grad, strict=True) if needed]
        gradients = _Gradients(wanted)
        groups = sequence.groups(y)
        # A few large groups are joined after all work is done; many small ones at once, instead of twice at the end.
        join_late = len(groups) <= 3
        pieces: list[Tensor] = []
        grad_x = torch.empty_like(grad_y) if x_needs_grad and not join_late else None
        for group in groups:
            state = _State(*y[group].chunk(2, dim=1), *grad_y[group].chunk(2, dim=1))
            for i, coupling in reversed(list(enumerate(sequence._couplings()))):
                # y2 = x2 + g(y1): recover x2, and pass the gradient of y2 on to y1
                _undo(ctx, (group.start, i, "g"), coupling, coupling.g, state, gradients, True)
                # y1 = x1 + f(x2): recover x1, and pass the gradient of y1 on to x2
                _undo(
                    ctx, (group.start, i, "f"), coupling, coupling.f, state, gradients, i > 0 or x_needs_grad
                )
            if grad_x is not None:
                torch.cat((state.d_given, state.d_result), dim=1, out=grad_x[group])
            elif x_needs_grad:
                pieces.append(torch.cat((state.d_given, state.d_result), dim=1))
            del state
        if pieces:
            grad_x = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return None, grad_x, *gradients.of(parameters)


@dataclass
class _State:
    """Where the walk back stands: ``result = other + module(given)``, and the gradients of both.

    Holds the only references, so that a stream is freed as soon as the one before it is known.
    """

    given: Tensor
    result: Tensor
    d_given: Tensor
    d_result: Tensor

    def swap(self) -> None:
        """The two streams change their roles."""
        self.given, self.result = self.result, self.given
        self.d_given, self.d_result = self.d_result, self.d_given


class _Seed(torch.autograd.Function):
    """A scalar whose backward pass starts at `output` with `gradient`; it does not keep `output` alive."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None


class _Gradients:
    """Sums the gradients of parameters over couplings and groups of samples."""

    def __init__(self, wanted: list[Tensor]) -> None:
        self.sums: dict[int, Tensor | None] = {id(parameter): None for parameter in wanted}

    def inputs(self, module: nn.Module) -> list[Tensor]:
        return [parameter for parameter in module.parameters() if id(parameter) in self.sums]

    def add(self, parameters: list[Tensor], gradients: Iterable[Tensor | None]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                before = self.sums[id(parameter)]
                self.sums[id(parameter)] = gradient if before is None else before + gradient

    def of(self, parameters: list[Tensor]) -> Iterator[Tensor | None]:
        return (self.sums.get(id(parameter)) for parameter in parameters)


def _run(
    ctx: Any, key: tuple[int, int, str], coupling: AdditiveCoupling, module: nn.Module, given: Tensor
) -> Tensor:
    """Evaluate one half in the forward pass; remember the generators' states if it used them."""
    # Under FakeTensorMode there are no random numbers, and states could not be compared.
    before = None if isinstance(given, FakeTensor) else _RandomState.now(given)
    version = None if given.is_inference() else given._version
    shift = module(lowered(given))
    if version is not None and given._version != version:
        raise RuntimeError(
            f"{type(module).__name__} changes its input in place; in a reversible sequence it must not: "
            "build it with inplace=False."
        )
    if before is not None and before.differs(_RandomState.now(given)):
        ctx.random[key] = before
    return coupling.finish(shift, given)


def _undo(
    ctx: Any,
    key: tuple[int, int, str],
    coupling: AdditiveCoupling,
    module: nn.Module,
    state: _State,
    gradients: _Gradients,
    further: bool,
) -> None:
    """Invert one half, ``other = result - module(given)``, and pass the gradient of `result` on to `given`.

    `further` is False where nothing needs the gradient of `given` any more. Nothing is changed in place: the
    tensors of `state` may be views of what the caller holds.
    """
    with torch.enable_grad(), ctx.autocast.enter():
        source = state.given.detach().requires_grad_(further)
        # A view, because hooks of modules (FLOP counters) can't follow a leaf within autograd.grad.
        shift = _recompute(module, lowered(source.view_as(source)), ctx.random.get(key))
    with torch.no_grad():
        state.result = state.result - coupling.finish(shift, source)
    weights = gradients.inputs(module)
    inputs = [source, *weights] if further else weights
    if inputs and shift.requires_grad:
        with torch.enable_grad():
            seed = _Seed.apply(shift, state.d_result.to(shift.dtype))
        del shift
        found = list(torch.autograd.grad(seed, inputs, allow_unused=True))
        d_source = found.pop(0) if further else None
        if d_source is not None:
            state.d_given = state.d_given + d_source
        gradients.add(weights, found)
    state.swap()


def _recompute(module: nn.Module, source: Tensor, random: _RandomState | None) -> Tensor:
    """Evaluate `module` once more: same random numbers, and buffers (running statistics) not counted twice."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    if random is None:
        return functional_call(module, buffers, (source,)) if buffers else module(source)
    with torch.random.fork_rng(random.devices, device_type=_generator_device(source)):
        random.restore(_generator_device(source))
        return functional_call(module, buffers, (source,)) if buffers else module(source)


def _generator_device(x: Tensor) -> str:
    return "cuda" if x.device.type == "cpu" else x.device.type  # fork_rng always keeps the CPU's state


def _warn_beyond_exact_range(largest: Tensor) -> None:
    if isinstance(largest, FakeTensor) or largest.is_meta:
        return
    if largest.item() >= EXACT_RANGE:
        warnings.warn(
            f"exact=True needs streams below {EXACT_RANGE:g}, got {largest.item():g}: from here on the inversion is "
            "rounded as with exact=False. Lower the learning rate or use fewer couplings.",
            stacklevel=2,
        )
