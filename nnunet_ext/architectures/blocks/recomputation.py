"""What a recomputed evaluation needs to be the same as the first: autocast, random numbers, running statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states


@dataclass(frozen=True)
class Autocast:
    """The state of autocast in the forward pass; nnU-Net calls backward outside of it."""

    device_type: str
    enabled: bool
    dtype: torch.dtype | None

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        """The present state."""
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
class RandomState:
    """States of the random generators that one half of a coupling consumed in the forward pass."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def now(cls, x: Tensor) -> RandomState:
        """The present states of the CPU's generator and that of x's device."""
        return cls(torch.get_rng_state(), *get_device_states(x))

    def differs(self, other: RandomState) -> bool:
        """Whether random numbers were drawn in between."""
        pairs = zip((self.cpu, *self.states), (other.cpu, *other.states), strict=True)
        return any(mine.numpy().tobytes() != theirs.numpy().tobytes() for mine, theirs in pairs)

    def restore(self, device_type: str) -> None:
        """Set the generators back."""
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states, device_type=device_type)


class Seed(torch.autograd.Function):
    """A scalar whose backward pass starts at `output` with `gradient`; it does not keep `output` alive."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        """Return an empty scalar."""
        ctx.gradient = gradient
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        """Start at the output."""
        return ctx.gradient, None


class Gradients:
    """Sums the gradients of parameters over couplings and groups of samples."""

    def __init__(self, wanted: list[Tensor]) -> None:
        self.sums: dict[int, Tensor | None] = {id(parameter): None for parameter in wanted}

    def inputs(self, module: nn.Module) -> list[Tensor]:
        """Parameters of a module whose gradients are wanted."""
        return [parameter for parameter in module.parameters() if id(parameter) in self.sums]

    def add(self, parameters: list[Tensor], gradients: Iterable[Tensor | None]) -> None:
        """Add to the sums."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                before = self.sums[id(parameter)]
                self.sums[id(parameter)] = gradient if before is None else before + gradient

    def of(self, parameters: list[Tensor]) -> Iterator[Tensor | None]:
        """The sums, None where there is none."""
        return (self.sums.get(id(parameter)) for parameter in parameters)


def recompute(module: nn.Module, source: Tensor, random: RandomState | None) -> Tensor:
    """Evaluate `module` once more: same random numbers, and buffers (running statistics) not counted twice."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    if random is None:
        return functional_call(module, buffers, (source,)) if buffers else module(source)
    with torch.random.fork_rng(random.devices, device_type=_generator_device(source)):
        random.restore(_generator_device(source))
        return functional_call(module, buffers, (source,)) if buffers else module(source)


def _generator_device(x: Tensor) -> str:
    return "cuda" if x.device.type == "cpu" else x.device.type  # fork_rng always keeps the CPU's state


def run_recomputed(
    module: nn.Module, recomputed: bool, *inputs: Tensor, group_elements: int | None = None
) -> Tensor:
    """Run a module that has no randomness; in training it keeps its inputs only and is run again in backward.

    Args:
        module: without dropout, and without running statistics, which would be counted twice.
        recomputed: False keeps everything, as plain autograd does.
        inputs: of the module.
        group_elements: run the samples in groups of at most this many elements of the largest input (at least one
            sample), for modules that treat samples independently. None: all at once.
    """
    if not (recomputed and torch.is_grad_enabled()):
        result: Tensor = module(*inputs)
        return result
    largest = max(x[0].numel() for x in inputs)
    size = len(inputs[0]) if group_elements is None else max(1, group_elements // largest)
    groups = zip(*(x.split(size) for x in inputs), strict=True)
    results = [checkpoint(module, *group, use_reentrant=False, preserve_rng_state=False) for group in groups]
    return results[0] if len(results) == 1 else torch.cat(results)
