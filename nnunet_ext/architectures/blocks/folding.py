"""Folds batch norms of a trained network into the convolutions before them, for prediction."""

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
from torch.nn.utils.fusion import fuse_conv_bn_weights


def fold_batch_norms(network: nn.Module) -> int:
    """Fold in place what can be folded, computed in float64; return the number of batch norms that are gone.

    A batch norm is folded where it directly follows a convolution in an `nn.Sequential`, as in nnU-Net's blocks
    (dropout in between does nothing in prediction). It becomes an `nn.Identity`, so that indices stay.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for conv, norm in _pairs(network):
        if conv not in replaced:
            replaced[conv], replaced[norm] = _folded(conv, norm), nn.Identity()
    # Blocks of nnU-Net hold their layers twice, by name and in a sequence.
    for parent in network.modules():
        for name, child in list(parent._modules.items()):
            if child in replaced:
                parent._modules[name] = replaced[child]
    return len(replaced) // 2


def _pairs(network: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Convolutions and the batch norms that follow them."""
    for sequence in network.modules():
        if not isinstance(sequence, nn.Sequential):
            continue
        layers = [layer for layer in sequence if not isinstance(layer, (_DropoutNd, nn.Identity))]
        for conv, norm in itertools.pairwise(layers):
            foldable = isinstance(norm, _BatchNorm) and norm.running_mean is not None
            if (
                foldable
                and isinstance(conv, _ConvNd)
                and not (isinstance(conv, _ConvTransposeNd) and conv.groups > 1)
            ):
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
