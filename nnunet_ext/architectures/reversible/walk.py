"""The way back through a chain: each step's input is recomputed from its output, and the gradients are passed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nnunet_ext.architectures.reversible.mixed_precision import convolution_gradients, is_plain_convolution, restored
from nnunet_ext.architectures.reversible.recomputation import Autocast, Held, Leaves, Places, Seed, Seen, recompute
from nnunet_ext.architectures.reversible.steps import Halves, Skip, Step, halves_of, join, part

# A whole feature map, and what the rounding of its halves has lost.
Anchor = tuple[Tensor, Tensor | None, Tensor | None]


class State:
    """Where the walk back stands: a feature map and its gradient, whole as they are kept, or as streams.

    As streams ``result = other + module(given)``; between couplings `given` and `result` are the first and the second
    half. Holds the only references, so that a stream is freed as soon as the one before it is known.

    Args:
        anchor: Feature map at the end of the chain.
        d_x: Its gradient; None: nothing but its taps is used.
        low: Dtype of whole feature maps; None: that of the streams.

    Attributes:
        given, result: Halves of the channels, and `d_given`, `d_result` their gradients; after `split`.
        skips: What the levels above left behind, and its gradients.
    """

    given: Tensor
    result: Tensor
    d_given: Tensor
    d_result: Tensor

    def __init__(self, anchor: Anchor, d_x: Tensor | None, low: torch.dtype | None) -> None:
        self._low = low
        self.skips: list[tuple[Skip, Skip]] = []
        self._anchor: Anchor | None = anchor
        self._d_x = d_x

    def split(self) -> None:
        """Go on with streams: halves that no other memory hangs on, in float32 under autocast, not so their gradients.

        A gradient in low precision is what nnU-Net's own networks pass on.
        """
        if self._anchor is None:
            return
        x, *errors = self._anchor
        self.given, self.result = halves_of(x)
        if self._low is not None:
            self.given, self.result = restored(self.given, errors[0]), restored(self.result, errors[1])
        d_x = torch.zeros_like(x) if self._d_x is None else self._d_x
        self._anchor = self._d_x = None
        # Copies, because a view keeps the other half alive after it has been replaced.
        self.d_given, self.d_result = (half.clone() for half in halves_of(d_x))

    def whole(self) -> Tensor:
        """The feature map as it is kept."""
        return self._joined(self.given, self.result) if self._anchor is None else self._anchor[0]

    def take_gradient(self, dtype: torch.dtype | None = None) -> Tensor:
        """Gradient of the whole feature map, in its dtype or another; it is here no more."""
        self.split()
        gradient = self._joined(self.d_given, self.d_result, dtype)
        del self.d_given, self.d_result
        return gradient

    def leave(self) -> Tensor:
        """Gradient of the whole feature map; neither is here any more."""
        gradient = self.take_gradient()
        del self.given, self.result
        return gradient

    def take(self) -> Tensor:
        """The whole feature map, of which the gradient was taken; it is here no more."""
        first = self.given.to(self._low or self.given.dtype)
        del self.given
        second = self.result.to(first.dtype)
        del self.result
        return torch.cat((first, second), dim=1)

    def start(self, anchor: Anchor, d_x: Tensor) -> None:
        """Go on with a feature map and its gradient, after both of before have left."""
        self._anchor, self._d_x = anchor, d_x

    def add(self, gradient: Tensor) -> None:
        """Add to the gradient of the feature map."""
        if self._anchor is not None and self._d_x is None:
            self._d_x = gradient
            return
        self.split()
        first, second = halves_of(gradient)
        self.d_given, self.d_result = added(self.d_given, first), added(self.d_result, second)

    def subtract(self, shifts: Halves) -> None:
        """Subtract from the streams."""
        self.given, self.result = added(self.given, shifts[0], -1), added(self.result, shifts[1], -1)

    def swap(self) -> None:
        """The two streams change their roles."""
        self.given, self.result = self.result, self.given
        self.d_given, self.d_result = self.d_result, self.d_given

    def part(self, channels: int) -> tuple[Tensor, Tensor]:
        """Take channels of the streams and their gradient off; the rest becomes a skip, and nothing stays here."""
        self.split()
        taken, rest = part((self.given, self.result), channels)
        del self.given, self.result
        d_taken, d_rest = part((self.d_given, self.d_result), channels)
        del self.d_given, self.d_result
        self.skips.append((rest, d_rest))
        return taken, d_taken

    def join(self, taken: list[Tensor]) -> None:
        """Put channels and their gradient back to the last skip; the list is emptied, so that they are freed."""
        (first, second), (d_first, d_second) = self.skips.pop()
        d_taken, x = taken.pop(), taken.pop()
        self.given, self.result = join(x, (first, second))
        del x, first, second
        self.d_given, self.d_result = join(d_taken, (d_first, d_second))

    def take_streams(self) -> tuple[Tensor, Tensor]:
        """The streams in one, and their gradients; they are here no more."""
        self.split()
        x = torch.cat((self.given, self.result), dim=1)
        del self.given, self.result
        d_x = torch.cat((self.d_given, self.d_result), dim=1)
        del self.d_given, self.d_result
        return x, d_x

    def set_streams(self, x: Tensor, d_x: Tensor) -> None:
        """Replace the streams and their gradients."""
        (self.given, self.result), (self.d_given, self.d_result) = halves_of(x), halves_of(d_x)

    def _joined(self, first: Tensor, second: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        joined = torch.empty(
            (len(first), 2 * first.shape[1], *first.shape[2:]),
            dtype=dtype or self._low or first.dtype,
            device=first.device,
        )
        for half, place in zip((first, second), halves_of(joined), strict=True):
            place.copy_(half)
        return joined


def added(x: Tensor, y: Tensor, factor: int = 1) -> Tensor:
    """``x + factor * y``, in place unless `x` is a view of what others may hold."""
    return torch.add(x, y, alpha=factor) if x._is_view() else x.add_(y, alpha=factor)


class Walk:
    """The way back of all groups of samples.

    Args:
        places: Places of the parameters, by module.
        autocast: State of autocast in the forward pass.
        leaves: Matrices of the steps, then parameters.
        is_exact: Whether the chain is.
        first_needs_grad: Whether something needs the gradient of the first feature map.

    Attributes:
        taps: Gradients of what the taps of the group gave out.
        kept: What the forward pass of the group kept.
    """

    def __init__(
        self, places: Places, autocast: Autocast, leaves: Leaves, *, is_exact: bool, first_needs_grad: bool
    ) -> None:
        self._places, self._autocast, self._leaves = places, autocast, leaves
        self.is_exact, self._first_needs_grad = is_exact, first_needs_grad
        self._seen: list[Seen | None] = []
        self._step = self._n_steps = 0
        self.taps: list[Tensor | None] = []
        self.kept: list[Tensor | None] = []

    def back(self, steps: Sequence[Step], state: State, taps: list[Tensor | None], seen: Sequence[Seen | None]) -> None:
        """Walk one group of samples back to the chain's first feature map, with what its forward pass has `kept`.

        Args:
            steps: Steps of the chain.
            state: State at the end of the chain.
            taps: Gradients of what the taps gave out.
            seen: What each evaluation of the forward pass saw, in their order.
        """
        self.taps, self._seen, self._n_steps = taps, list(seen), len(steps)
        for self._step, step in reversed(list(enumerate(steps))):
            step.walk_back(state, self)

    def moved(self, map_: Callable[..., Tensor], y: Tensor) -> Tensor:
        """Return ``map_(y, matrix)`` with the matrix of the present step."""
        with torch.no_grad():
            return map_(y, self._leaves.tensors[self._step])

    def pulled(self, map_: Callable[..., Tensor], x: Tensor, d_y: Tensor) -> Tensor:
        """Gradient of x for ``y = map_(x, matrix)``; that of the present step's matrix is added up."""
        wanted = self._leaves.wanted([self._step])
        with torch.enable_grad():
            source = x.detach().requires_grad_()
            y = map_(source.view_as(source), self._leaves.tensors[self._step])
        d_x, *found = torch.autograd.grad(y, [source, *wanted.values()], d_y.to(y.dtype))
        self._leaves.add(wanted, found)
        return d_x.to(d_y.dtype)

    def anchor(self) -> Anchor:
        """The last feature map that was kept to start from, of those not yet taken."""
        second, first, x = (self.kept.pop() for _ in range(3))
        return cast(Anchor, (x, first, second))

    def pass_over(self) -> None:
        """Leave out one evaluation, whose result nothing depends on."""
        self._seen.pop()

    def through(
        self,
        module: nn.Module,
        inputs: Sequence[Tensor],
        d_y: Tensor,
        *,
        look: Callable[[Tensor], None] | None = None,
        needed: bool = True,
    ) -> list[Tensor]:
        """Gradients of the inputs of ``y = module(*inputs)``; those of its weights are added up.

        Args:
            module: The last that the forward pass evaluated of those not yet walked back.
            inputs: What it was given.
            d_y: Gradient of y.
            look: Called with y.
            needed: Whether the gradients of the inputs are; else there are none in the list.
        """
        places = self._indexed(module)
        if look is None and is_plain_convolution(module):
            self._seen.pop()
            return self._through_convolution(module, inputs[0], d_y, places, needed)
        with torch.enable_grad(), self._autocast.enter():
            sources = [self._autocast.lowered(x).detach().requires_grad_(needed) for x in inputs]
            y = self._recomputed(module, sources, places)
        if look is not None:
            look(y.detach())
        seed = _seed(y, d_y)
        del y
        found = self._gradients(seed, places, sources if needed else [])
        return [torch.zeros_like(x) if d is None else d.to(x.dtype) for x, d in zip(inputs, found, strict=False)]

    def undo(
        self, module: nn.Module, finish: Callable[[Tensor, Tensor], Tensor], state: State, ends_step: bool = False
    ) -> None:
        """Invert one half, ``other = result - finish(module(given))``, and pass the gradient of `result` to `given`.

        Args:
            module: Function f or g, the last that the forward pass evaluated of those not yet undone.
            finish: What the coupling does with its result.
            state: State of the walk; the streams have changed their roles afterwards.
            ends_step: Whether the step is undone then.
        """
        state.split()
        # Whether anything before needs the gradient of `given`.
        further = not ends_step or self._step > 0 or self._first_needs_grad
        places = self._indexed(module)
        with torch.enable_grad(), self._autocast.enter():
            source = self._autocast.lowered(state.given).detach().requires_grad_(further)
            shift = self._recomputed(module, [source], places)
        with torch.no_grad():
            state.result = added(state.result, finish(shift.detach(), state.given), -1)
        seed = _seed(shift, state.d_result)
        del shift
        for d_source in self._gradients(seed, places, [source] if further else []):
            if d_source is not None:
                state.d_given = added(state.d_given, d_source)
        state.swap()

    def _indexed(self, module: nn.Module) -> list[tuple[Held, str, int]]:
        """Places of a module's parameters, and where these stand among the leaves."""
        return [(held, name, self._n_steps + i) for held, name, i in self._places[module]]

    def _recomputed(self, module: nn.Module, sources: Sequence[Tensor], places: list[tuple[Held, str, int]]) -> Tensor:
        weights = [(held, name, self._leaves.tensors[i]) for held, name, i in places]
        # Views, because hooks of modules (FLOP counters) can't follow a leaf within autograd.grad.
        return recompute(module, [source.view_as(source) for source in sources], self._seen.pop(), weights)

    def _gradients(
        self, seed: Tensor, places: list[tuple[Held, str, int]], sources: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Gradients of sources; those of the weights are added up. Where the seed depends on nothing there are none."""
        wanted = self._leaves.wanted(i for _, _, i in places)
        inputs = [*sources, *wanted.values()]
        if not inputs or not seed.requires_grad:
            return [None for _ in sources]
        found: list[Tensor | None] = list(torch.autograd.grad(seed, inputs, allow_unused=True))
        self._leaves.add(wanted, found[len(sources) :])
        return found[: len(sources)]

    def _through_convolution(
        self, conv: nn.Module, x: Tensor, d_y: Tensor, places: list[tuple[Held, str, int]], needed: bool
    ) -> list[Tensor]:
        """The same for a convolution, which needs not be run again."""
        indices = {name: i for _, name, i in places}
        weight = cast(Tensor, self._leaves.tensors[indices["weight"]])
        bias = self._leaves.tensors[indices["bias"]] if "bias" in indices else None
        d_x, *found = convolution_gradients(conv, x, weight, bias, d_y, dtype=self._autocast.low, needs_input=needed)
        for name, gradient in zip(("weight", "bias"), found, strict=True):
            if gradient is not None:
                self._leaves.add([indices[name]], [gradient])
        return [] if d_x is None else [d_x]


def _seed(y: Tensor, d_y: Tensor) -> Tensor:
    """What a backward pass from y starts at, without keeping y alive."""
    with torch.enable_grad():
        seed: Tensor = Seed.apply(y, d_y.to(y.dtype))
        return seed
