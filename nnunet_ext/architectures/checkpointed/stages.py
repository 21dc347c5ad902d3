"""nnU-Net's stages, run from convolution to convolution: what lies between two of them is not kept.

A checkpoint that ends in a convolution costs no second one: recomputation stops at the convolution's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD, StackedResidualBlocks
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from torch import Tensor, nn
from torch.nn import functional

from nnunet_ext.architectures.checkpointed.repeated import repeated

_SEQUENCES = {StackedConvBlocks: "convs", StackedResidualBlocks: "blocks"}
# A convolution with so many times more outputs than inputs, as the first of a network, rather runs once more.
_CHEAP = 8

Start = Callable[..., Tensor]
Step = Callable[[Tensor], Tensor]


def _given(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Pending:
    """A feature map that is not computed yet, of which training keeps the inputs only.

    Args:
        inputs: Feature maps that are kept.
        start: Makes one of them; it must not hold them itself.
        steps: Modules that follow.
        modules: What `start` calls.
    """

    inputs: tuple[Tensor, ...]
    start: Start = _given
    steps: tuple[Any, ...] = ()
    modules: tuple[nn.Module, ...] = ()

    def then(self, *steps: Any) -> Pending:
        """Go on with these modules."""
        return Pending(self.inputs, self.start, (*self.steps, *steps), self.modules)

    @property
    def called(self) -> tuple[nn.Module, ...]:
        """All modules that compute it."""
        return (*self.modules, *self.steps)

    @property
    def run(self) -> Callable[..., Tensor]:
        """Function of the inputs that computes it, or what further steps make of it."""
        start, steps = self.start, self.steps

        def run(*inputs: Tensor, further: Sequence[Step] = ()) -> Tensor:
            x = start(*inputs)
            return _in_turn((*steps, *further), x, is_fresh=all(x is not given for given in inputs))

        return run

    def kept(self) -> Tensor:
        """Compute it."""
        if not self.called:
            return self.start(*self.inputs)
        result: Tensor = repeated(self.run, self.called, *self.inputs)
        return result

    def kept_with(self, conv: nn.Module) -> tuple[Tensor, Tensor]:
        """Compute it and what a convolution makes of it; the convolution does not keep its input."""
        if not self.called:
            x = self.start(*self.inputs)
            return x, conv(x)
        run = self.run

        def both(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            x = run(*inputs)
            return x, conv(x)

        found: tuple[Tensor, Tensor] = repeated(both, (*self.called, conv), *self.inputs)
        return found


def through(blocks: Iterable[nn.Module], x: Pending) -> Pending:
    """Run blocks of nnU-Net, or any other modules, one after the other."""
    for block in blocks:
        if _is_bare(block, ConvDropoutNormReLU):
            x = _convolved(block.all_modules, x)
        elif _is_bare(block, BasicBlockD, BottleneckD):
            x = _residual(block, x)
        else:
            x = Pending((block(x.kept()),))
    return x


def _convolved(layers: Any, x: Pending) -> Pending:
    conv, *others = layers
    x = x.then(conv)
    is_cheap = conv.out_channels >= _CHEAP * conv.in_channels
    return (x if is_cheap else Pending((x.kept(),))).then(*others)


def _residual(block: Any, x: Pending) -> Pending:
    """The operations of nnU-Net's residual block, in the same order."""
    convs = [getattr(block, name) for name in ("conv1", "conv2", "conv3") if hasattr(block, name)]
    projects = isinstance(block.skip, nn.Module)  # else a function that gives back its input
    if projects or not _is_bare(convs[0], ConvDropoutNormReLU):
        x = Pending((x.kept(),))
        # In nnU-Net's order, in which gradients are summed.
        shortcut, path = through(blocks_of(block.skip) if projects else [], x), through(convs, x)
    else:
        conv, *others = convs[0].all_modules
        value, convolved = x.kept_with(conv)
        shortcut, path = Pending((value,)), through(convs[1:], Pending((convolved,)).then(*others))
    switches = {"drop_path": "apply_stochastic_depth", "squeeze_excitation": "apply_se"}
    path = path.then(*(getattr(block, name) for name, switch in switches.items() if getattr(block, switch)))
    nonlin = getattr(block, f"nonlin{len(convs)}")
    n, path_run, shortcut_run = len(path.inputs), path.run, shortcut.run

    def added(*inputs: Tensor) -> Tensor:
        return path_run(*inputs[:n], further=(_Plus(shortcut_run(*inputs[n:])), nonlin))

    called = (*path.called, *shortcut.called, *([nonlin] if isinstance(nonlin, nn.Module) else []))
    return Pending((*path.inputs, *shortcut.inputs), added, (), called)


class _Plus:
    """Adds a feature map in place."""

    inplace = True

    def __init__(self, other: Tensor) -> None:
        self.other = other

    def __call__(self, x: Tensor) -> Tensor:
        x += self.other.view(x.shape)
        return x


def _in_turn(steps: Iterable[Any], x: Tensor, is_fresh: bool) -> Tensor:
    """Run steps one after the other.

    Args:
        steps: Modules, in place or not.
        x: Their input.
        is_fresh: Whether it may be changed.
    """
    remaining = list(steps)
    while remaining:
        step = remaining.pop(0)
        if _is_in_place(step) and not is_fresh:
            x = x.clone()
        if _is_instance_norm(step) and remaining and _is_in_place(remaining[0]):
            y = _normalized(step, x)
            while remaining and _is_in_place(remaining[0]):
                y = remaining.pop(0)(y)
            y = y.view(x.shape)
        else:
            y = step(x)
        is_fresh, x = is_fresh or y is not x, y
    return x


def _is_in_place(step: Any) -> bool:
    return bool(getattr(step, "inplace", False))


def _is_instance_norm(step: Any) -> bool:
    return _is_bare(step, nn.InstanceNorm2d, nn.InstanceNorm3d) and not step.track_running_stats


def _normalized(norm: Any, x: Tensor) -> Tensor:
    """Instance norm as PyTorch computes it, by batch norm with samples as channels: (1, B C, *spatial).

    PyTorch's own gives a view of that, and what then changes the view in place costs autograd copies of the gradient.
    """
    weight, bias = (None if p is None else p.repeat(len(x)) for p in (norm.weight, norm.bias))
    flat = x.contiguous().view(1, -1, *x.shape[2:])
    return functional.batch_norm(flat, None, None, weight, bias, True, norm.momentum, norm.eps)


def joined(up: nn.Module, below: Tensor, *skips: Tensor) -> Pending:
    """A feature map led one level up, with the skips of this level after it."""

    def join(below: Tensor, *skips: Tensor) -> Tensor:
        maps = (up(below), *skips)
        return torch.cat(maps, dim=1) if torch.compiler.is_compiling() else _Join.apply(*maps)

    return Pending((below, *skips), join, (), (up,))


class _Join(torch.autograd.Function):
    """``torch.cat`` along channels; gradients of the skips are no views, which would hold that of the whole."""

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        ctx.channels = [x.shape[1] for x in maps]
        return torch.cat(maps, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        first, *others = gradient.split(ctx.channels, dim=1)
        _, *needed = ctx.needs_input_grad
        return first, *(x.clone() if wanted else None for x, wanted in zip(others, needed, strict=True))


def blocks_of(stage: Any) -> list[nn.Module]:
    """What a stage of nnU-Net runs in turn; of any other module itself."""
    if _is_bare(stage, nn.Sequential):
        return [block for part in stage for block in blocks_of(part)]
    for kind, name in _SEQUENCES.items():
        if _is_bare(stage, kind):
            return blocks_of(getattr(stage, name))
    return [stage]


def _is_bare(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of these classes, and nobody has asked to be called with it."""
    return type(module) in kinds and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
