"""The way back through a chain: each step's input is recomputed from its output, and the gradients are passed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnunet_ext.architectures.reversible.mixed_precision import lowered
from nnunet_ext.architectures.reversible.recomputation import Autocast, Leaves, Places, Seed, Seen, recompute
from nnunet_ext.architectures.reversible.steps import Halves, Step, halves_of, join, part


@dataclass(kw_only=True)
class State:
    """Where the walk back stands: ``result = other + module(given)``, and the gradients of both.

    Between couplings `given` and `result` are the first and the second half. Holds the only references, so that a
    stream is freed as soon as the one before it is known.
    """

    given: Tensor
    result: Tensor
    d_given: Tensor
    d_result: Tensor
    skips: list[tuple[Halves, Halves]]  # and their gradients

    @classmethod
    def at(cls, y: Tensor, d_y: Tensor) -> State:
        """Start at the last feature map and its gradient."""
        (given, result), (d_given, d_result) = halves_of(y), halves_of(d_y)
        return cls(given=given, result=result, d_given=d_given, d_result=d_result, skips=[])

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
        (self.given, self.result), (self.d_given, self.d_result) = halves_of(x), halves_of(d_x)


class Walk:
    """The way back of all groups of samples.

    Args:
        places: Places of the parameters, by module.
        autocast: State of autocast in the forward pass.
        leaves: Matrices of the steps, then parameters.
        x_needs_grad: Whether the chain's input does.

    Attributes:
        taps: Gradients of what the taps of the group gave out.
    """

    def __init__(self, places: Places, autocast: Autocast, leaves: Leaves, x_needs_grad: bool) -> None:
        self._places, self._autocast, self._leaves = places, autocast, leaves
        self._x_needs_grad = x_needs_grad
        self._seen: list[Seen | None] = []
        self._step = self._n_steps = 0
        self.taps: list[Tensor | None] = []

    def back(self, steps: Sequence[Step], state: State, taps: list[Tensor | None], seen: Sequence[Seen | None]) -> None:
        """Walk one group of samples back to the chain's input.

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
        d_x, *found = torch.autograd.grad(y, [source, *wanted.values()], d_y)
        self._leaves.add(wanted, found)
        return d_x

    def undo(
        self, module: nn.Module, finish: Callable[[Tensor, Tensor], Tensor], state: State, ends_step: bool = False
    ) -> None:
        """Invert one half, ``other = result - finish(module(given))``, and pass the gradient of `result` to `given`.

        Nothing is changed in place: the tensors of `state` may be views of what the caller holds.

        Args:
            module: Function f or g, the last that the forward pass evaluated of those not yet undone.
            finish: What the coupling does with its result.
            state: State of the walk; the streams have changed their roles afterwards.
            ends_step: Whether the step is undone then.
        """
        # Whether anything before needs the gradient of `given`.
        further = not ends_step or self._step > 0 or self._x_needs_grad
        places = [(held, name, self._n_steps + i) for held, name, i in self._places[module]]
        weights = [(held, name, self._leaves.tensors[i]) for held, name, i in places]
        with torch.enable_grad(), self._autocast.enter():
            source = state.given.detach().requires_grad_(further)
            # A view, because hooks of modules (FLOP counters) can't follow a leaf within autograd.grad.
            shift = recompute(module, lowered(source.view_as(source)), self._seen.pop(), weights)
        with torch.no_grad():
            state.result = state.result - finish(shift, source)
        wanted = self._leaves.wanted(i for _, _, i in places)
        inputs = [source, *wanted.values()] if further else list(wanted.values())
        if inputs and shift.requires_grad:
            with torch.enable_grad():
                seed = Seed.apply(shift, state.d_result.to(shift.dtype))
            del shift
            found = list(torch.autograd.grad(seed, inputs, allow_unused=True))
            d_source = found.pop(0) if further else None
            if d_source is not None:
                state.d_given = state.d_given + d_source
            self._leaves.add(wanted, found)
        state.swap()
