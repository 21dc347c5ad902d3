"""What a recomputed evaluation needs to be the same as the first: autocast, modes, random numbers, buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

Forward = TypeVar("Forward", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True, eq=False)
class RandomState:
    """States of the random generators before an evaluation."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def now(cls, x: Tensor) -> RandomState:
        """The present states of the CPU's generator and that of x's device."""
        return cls(torch.get_rng_state(), *get_device_states(x))

    def restore(self, device_type: str) -> None:
        """Set the generators back."""
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states, device_type=device_type)


@dataclass(frozen=True, eq=False)
class Seen:
    """What an evaluation of a module sees, and a repeated one would not see any more.

    Args:
        random: states of the generators, where the module may draw.
        buffers: copies of those that it may read, by name.
    """

    random: RandomState | None
    buffers: dict[str, Tensor]

    @classmethod
    def by(cls, module: nn.Module, x: Tensor) -> Seen | None:
        """What `module` sees when it is called with `x` now; None where nothing of it changes."""
        # Under FakeTensorMode there are no random numbers.
        random = RandomState.now(x) if not isinstance(x, FakeTensor) and may_draw(module) else None
        buffers = {
            f"{prefix}.{name}" if prefix else name: buffer.clone()
            for prefix, part in module.named_modules()
            if not (isinstance(part, _NormBase) and part.training)  # running statistics are only written
            for name, buffer in part.named_buffers(recurse=False)
        }
        return cls(random, buffers) if random or buffers else None


class Modes:
    """Whether each part of some modules is in training; nnU-Net's `eval()` may come between forward and backward.

    Args:
        modules: whose present modes are kept.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modes = [(part, part.training) for module in modules for part in module.modules()]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put them back for a while."""
        changed = {part for part, training in self._modes if part.training != training}
        for part in changed:
            part.training = not part.training
        try:
            yield
        finally:
            for part in changed:
                part.training = not part.training


# What PyTorch and nnU-Net define here draws no random numbers, but for the exceptions; of other modules it is unknown.
_DRAWS_NOTHING = {
    *(
        f"torch.nn.modules.{name}"
        for name in ("activation", "batchnorm", "container", "conv", "flatten", "instancenorm", "linear")
    ),
    *(f"torch.nn.modules.{name}" for name in ("normalization", "padding", "pooling", "upsampling")),
    "dynamic_network_architectures.building_blocks.simple_conv_blocks",
}
_EXCEPTIONS = (nn.RReLU, nn.MultiheadAttention, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


def may_draw(module: nn.Module) -> bool:
    """Whether a call of `module` may use random numbers."""
    return any(_may_draw(part) for part in module.modules())


def _may_draw(part: nn.Module) -> bool:
    if part._forward_hooks or part._forward_pre_hooks:
        return True
    kind = type(part).__module__
    if kind == "torch.nn.modules.dropout":
        return part.training and cast(_DropoutNd, part).p > 0
    return kind not in _DRAWS_NOTHING or isinstance(part, _EXCEPTIONS)


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


def recompute(module: nn.Module, source: Tensor, seen: Seen | None) -> Tensor:
    """Evaluate `module` once more as it was `seen`; buffers (running statistics) are not counted twice."""
    before = {} if seen is None else seen.buffers
    buffers = {name: before.get(name, buffer).clone() for name, buffer in module.named_buffers()}
    with nullcontext() if seen is None or seen.random is None else _replayed(seen.random, source):
        return functional_call(module, buffers, (source,)) if buffers else module(source)


@contextmanager
def _replayed(random: RandomState, x: Tensor) -> Iterator[None]:
    device_type = "cuda" if x.device.type == "cpu" else x.device.type  # fork_rng always keeps the CPU's state
    with torch.random.fork_rng(random.devices, device_type=device_type):
        random.restore(device_type)
        yield


def run_recomputed(
    module: nn.Module, recomputed: bool, *inputs: Tensor, group_elements: int | None = None
) -> Tensor:
    """Run a module; in training it keeps its inputs only and is run again in backward, in the modes of now.

    Args:
        module: without running statistics, which would be counted twice.
        recomputed: False keeps everything, as plain autograd does.
        inputs: of the module.
        group_elements: run the samples in groups of at most this many elements of the largest input (at least one
            sample), for modules that treat samples independently. None: all at once.
    """
    # PyTorch's checkpoint gives RReLU wrong gradients: its noise is saved before it is drawn.
    noisy = any(isinstance(part, nn.RReLU) for part in module.modules())
    if noisy or not (recomputed and torch.is_grad_enabled()):
        result: Tensor = module(*inputs)
        return result
    draws = may_draw(module) and not isinstance(inputs[0], FakeTensor)
    # A compiled graph keeps the modes that it was made with.
    run = module if torch.compiler.is_compiling() else _in_modes_of_now(module)
    largest = max(x[0].numel() for x in inputs)
    size = len(inputs[0]) if group_elements is None else max(1, group_elements // largest)
    groups = zip(*(x.split(size) for x in inputs), strict=True)
    results = [checkpoint(run, *group, use_reentrant=False, preserve_rng_state=draws) for group in groups]
    return results[0] if len(results) == 1 else torch.cat(results)


def uncompiled(forward: Forward) -> Forward:
    """Leave a forward pass that recomputes out of `torch.compile`; where ``self.reversible`` is False it is compiled.

    Each chain would break the graph. What stays between them are single convolutions, in which a compiler finds
    nothing to fuse, and one frame for all of them that soon meets PyTorch's recompile limit: the step was slower than
    without (docs/methods/reversible.md). Passes without gradients, as in validation, are compiled.
    """
    left_out = torch.compiler.disable(forward)

    @wraps(forward)
    def run(self: Any, *inputs: Any) -> Any:
        return (left_out if self.reversible and torch.is_grad_enabled() else forward)(self, *inputs)

    return cast(Forward, run)


def _in_modes_of_now(module: nn.Module) -> Callable[..., Tensor]:
    modes = Modes([module])

    def run(*inputs: Tensor) -> Tensor:
        with modes.restored():
            result: Tensor = module(*inputs)
            return result

    return run
