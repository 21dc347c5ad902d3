"""Folds what a trained network need not compute again: batch norms into convolutions, parametrised weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights


def is_foldable(network: nn.Module) -> bool:
    """Whether `fold_batch_norms` or `fold_parametrizations` would find something."""
    parametrized = any(parametrize.is_parametrized(module) for module in network.modules())
    return parametrized or any(True for _ in _pairs(network))


def fold_batch_norms(network: nn.Module) -> int:
    """Fold in place what can be folded, computed in float64; return the number of batch norms that are gone.

    A batch norm is folded where it directly follows a convolution in an `nn.Sequential`, as in nnU-Net's blocks
    (dropout in between does nothing in prediction). It becomes an `nn.Identity`, so that indices stay.
    """
    convs: dict[nn.Module, nn.Module] = {}
    means: set[int] = set()
    for conv, norm in _pairs(network):
        if conv not in convs:
            convs[conv] = _folded(conv, norm)
            means.add(id(norm.running_mean))
    # nnU-Net's blocks hold their layers twice, by name and in a sequence; synchronised norms are twins with one mean.
    for parent in network.modules():
        for name, child in parent.named_children():
            if child in convs:
                setattr(parent, name, convs[child])
            elif isinstance(child, _BatchNorm) and id(child.running_mean) in means:
                setattr(parent, name, nn.Identity())
    return len(convs)


def fold_parametrizations(network: nn.Module) -> int:
    """Store weights that are functions of parameters (orthogonal matrices, weight norm) in place of these functions.

    Returns their number.
    """
    parametrized: list[Any] = [module for module in network.modules() if parametrize.is_parametrized(module)]
    for module in parametrized:
        values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
        # PyTorch's own removal changes the class, which a copy shares with the network that was copied.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value))
    return len(parametrized)


def is_standard(module: Any, kind: type[nn.Module]) -> bool:
    """Whether it is of this kind, and PyTorch's own: a subclass may compute anything."""
    return isinstance(module, kind) and type(module).__module__.startswith("torch.nn.modules.")


def _pairs(network: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Convolutions and the batch norms that follow them."""
    for sequence in network.modules():
        if not isinstance(sequence, nn.Sequential):
            continue
        passing = (_DropoutNd, nn.Identity)
        layers: list[Any] = [layer for layer in sequence if not any(is_standard(layer, kind) for kind in passing)]
        for conv, norm in itertools.pairwise(layers):
            if not (is_standard(conv, _ConvNd) and is_standard(norm, _BatchNorm)):
                continue
            if norm.running_mean is not None and not (isinstance(conv, _ConvTransposeNd) and conv.groups > 1):
                yield conv, norm


def _folded(conv: Any, norm: Any) -> nn.Module:
    """Return one convolution for ``norm(conv(x))``."""
    numbers = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    # In float64 on the CPU, because not every device has it.
    exact: list[Any] = [None if n is None else n.detach().to("cpu", torch.float64) for n in numbers]
    weight, bias, mean, variance, scale, shift = exact
    transposed = isinstance(conv, _ConvTransposeNd)
    weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift, transposed)
    kind = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    # The tensors of the copy are given, not copied.
    folded = copy.deepcopy(conv, {id(n): None for n in numbers[:2] if n is not None})
    folded.weight, folded.bias = nn.Parameter(weight.to(**kind)), nn.Parameter(bias.to(**kind))
    return folded
