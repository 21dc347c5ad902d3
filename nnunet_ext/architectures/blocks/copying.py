"""Copies of networks, also of those that hold shapes only."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def copied(network: Network) -> Network:
    """Copy a network whole; `copy.deepcopy`, but for tensors without data (PyTorch's fake tensors) too.

    Tensors are cloned before the rest is copied, shared ones once.
    """
    tensors: list[Tensor] = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): _cloned(tensor) for tensor in tensors})


def _cloned(tensor: Tensor) -> Tensor:
    clone = tensor.detach().clone()
    return nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
