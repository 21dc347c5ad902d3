"""What a recomputed evaluation needs to be the same as the first: autocast, modes, random numbers, buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from nnunet_ext.architectures.common.kept import is_everything_kept
from nnunet_ext.architectures.common.onednn import is_exporting, is_transformed

Forward = TypeVar("Forward", bound=Callable[..., Any])
Held = dict[str, Any]  # what a module calls `_parameters` or `_buffers`


def can_recompute() -> bool:
    """Whether gradients are wanted, and by nothing that needs all of the graph: export, `torch.func`, a reference."""
    return torch.is_grad_enabled() and not is_exporting() and not is_transformed() and not is_everything_kept()


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

    @property
    def low(self) -> torch.dtype | None:
        """Dtype of low precision in which it evaluates; None where it is off."""
        return self.dtype if self.enabled else None

    def lowered(self, x: Tensor) -> Tensor:
        """`x` in that dtype where x is float32; otherwise `x` itself."""
        return x.to(self.dtype) if self.enabled and x.dtype == torch.float32 else x

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
        random: States of the generators, where the module may draw.
        buffers: Copies of those that it may read, and where they stand.
    """

    random: RandomState | None
    buffers: Sequence[tuple[Held, str, Tensor]]

    @classmethod
    def by(cls, module: nn.Module, x: Tensor) -> Seen | None:
        """What `module` sees when it is called with `x` now; None where nothing of it changes."""
        # Under FakeTensorMode there are no random numbers.
        random = RandomState.now(x) if not isinstance(x, FakeTensor) and may_draw(module) else None
        buffers = [
            (part._buffers, name, buffer.clone())
            for part in module.modules()
            if not (isinstance(part, _NormBase) and part.training)  # running statistics are only written
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]
        return cls(random, buffers) if random or buffers else None


class Modes:
    """Whether each part of some modules is in training, and how much dropout drops: `eval()` may come before backward.

    Args:
        modules: Whose present modes are kept.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modes = [(part, _mode(part)) for module in modules for part in module.modules()]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put them back for a while."""
        present = [(part, _mode(part), mode) for part, mode in self._modes]
        changed = [(part, now, mode) for part, now, mode in present if now != mode]
        for part, _, mode in changed:
            vars(part).update(mode)
        try:
            yield
        finally:
            for part, now, _ in changed:
                vars(part).update(now)


def _mode(part: nn.Module) -> dict[str, Any]:
    return {"training": part.training, "p": part.p} if isinstance(part, _DropoutNd) else {"training": part.training}


# What PyTorch and nnU-Net define here draws no random numbers, but for the exceptions; of other modules it is unknown.
_DRAWS_NOTHING = {
    *(
        f"torch.nn.modules.{name}"
        for name in ("activation", "batchnorm", "container", "conv", "flatten", "instancenorm", "linear")
    ),
    *(f"torch.nn.modules.{name}" for name in ("normalization", "padding", "pooling", "upsampling")),
    *(f"dynamic_network_architectures.building_blocks.{name}" for name in ("residual", "simple_conv_blocks")),
    "nnunet_ext.architectures.partially_invertible_unet",
    "nnunet_ext.architectures.reversible.frugal",
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


Places = dict[nn.Module, list[tuple[Held, str, int]]]  # which of some tensors stands where, by module


class Weights:
    """Parameters of some modules, each once, and where they stand.

    By place and not by identity: in the backward pass a module may hold others (`functional_call`, a state_dict that
    was assigned), and what autograd kept may be copies (hooks of saved tensors, a checkpoint around).

    Args:
        modules: Modules that hold them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.tensors: list[Tensor] = []
        self.places: Places = {}
        indices: dict[int, int] = {}
        for module in modules:
            self.places[module] = places = []
            for held, name, tensor in parameters_of(module):
                index = indices.setdefault(id(tensor), len(self.tensors))
                if index == len(self.tensors):
                    self.tensors.append(tensor)
                places.append((held, name, index))


class Leaves:
    """Weights as leaves of a graph of their own, and the sums of their gradients over couplings and groups of samples.

    Hooks of the weights themselves so see the whole gradient, once.

    Args:
        tensors: None stays None.
        needed: Whether a gradient is wanted, for each.
    """

    def __init__(self, tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> None:
        self.tensors = [
            None if tensor is None else tensor.detach().requires_grad_(wanted)
            for tensor, wanted in zip(tensors, needed, strict=True)
        ]
        self.sums: list[Tensor | None] = [None] * len(self.tensors)

    def wanted(self, indices: Iterable[int]) -> dict[int, Tensor]:
        """Those of some leaves whose gradients are wanted, each once."""
        leaves = {i: self.tensors[i] for i in indices}
        return {i: leaf for i, leaf in leaves.items() if leaf is not None and leaf.requires_grad}

    def add(self, indices: Iterable[int], gradients: Iterable[Tensor | None]) -> None:
        """Add to the sums."""
        for i, gradient in zip(indices, gradients, strict=True):
            if gradient is not None:
                before = self.sums[i]
                self.sums[i] = gradient if before is None else before + gradient


def parameters_of(module: nn.Module) -> list[tuple[Held, str, Tensor]]:
    """Parameters and where they stand, each place once (nnU-Net's blocks hold their layers under two names)."""
    return [
        (part._parameters, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None
    ]


@contextmanager
def standing(tensors: Iterable[tuple[Held, str, Tensor | None]]) -> Iterator[None]:
    """Put tensors into their places for a while.

    As `torch.func.functional_call`, which leaves them there where a module has two names.
    """
    before: list[tuple[Held, str, Any]] = []
    try:
        for held, name, tensor in tensors:
            before.append((held, name, held[name]))
            held[name] = tensor
        yield
    finally:
        for held, name, tensor in reversed(before):
            held[name] = tensor


def recompute(
    module: nn.Module,
    sources: Sequence[Tensor],
    seen: Seen | None,
    weights: Iterable[tuple[Held, str, Tensor | None]] = (),
) -> Tensor:
    """Evaluate `module` once more as it was `seen`, with `weights`; running statistics are not counted twice."""
    present = [
        (part._buffers, name, buffer)
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    buffers = [(held, name, buffer.clone()) for held, name, buffer in [*present, *(seen.buffers if seen else ())]]
    random = None if seen is None else seen.random
    with nullcontext() if random is None else _replayed(random, sources[0]), standing([*weights, *buffers]):
        result: Tensor = module(*sources)
        return result


@contextmanager
def _replayed(random: RandomState, x: Tensor) -> Iterator[None]:
    device_type = "cuda" if x.device.type == "cpu" else x.device.type  # fork_rng always keeps the CPU's state
    with torch.random.fork_rng(random.devices, device_type=device_type):
        random.restore(device_type)
        yield


def run_recomputed(module: nn.Module, recomputed: bool, *inputs: Tensor) -> Tensor:
    """Run a module; in training it keeps its inputs only and is run again, with modes and weights of now.

    Args:
        module: Module without running statistics, which would be counted twice.
        recomputed: False keeps everything, as plain autograd does.
        inputs: Inputs of the module.
    """
    # PyTorch's checkpoint gives RReLU wrong gradients: its noise is saved before it is drawn.
    noisy = any(isinstance(part, nn.RReLU) for part in module.modules())
    if noisy or not (recomputed and can_recompute()):
        result: Tensor = module(*inputs)
        return result
    draws = may_draw(module) and not isinstance(inputs[0], FakeTensor)
    # A compiled graph keeps the modes that it was made with.
    run = module if torch.compiler.is_compiling() else _as_now(module)
    result = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=draws)
    return result


def uncompiled(forward: Forward) -> Forward:
    """Leave a forward pass that recomputes out of `torch.compile`; where ``self.reversible`` is False it is compiled.

    Each chain would break the graph. What stays between them are single convolutions, in which a compiler finds
    nothing to fuse, and one frame for all of them that soon meets PyTorch's recompile limit: the step was slower than
    without (docs/methods/reversible.md). Passes without gradients, as in validation, are compiled.
    """
    left_out = torch.compiler.disable(forward)

    @wraps(forward)
    def run(self: Any, *inputs: Any) -> Any:
        return (left_out if self.reversible and can_recompute() else forward)(self, *inputs)

    return cast(Forward, run)


def _as_now(module: nn.Module) -> Callable[..., Tensor]:
    """`module` with its present modes and parameters."""
    modes, parameters = Modes([module]), parameters_of(module)

    def run(*inputs: Tensor) -> Tensor:
        with modes.restored(), standing(parameters):
            result: Tensor = module(*inputs)
            return result

    return run
