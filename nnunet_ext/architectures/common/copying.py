"""Copies of networks, also of those that hold shapes only, and their conversion while they predict."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def copied(network: Network) -> Network:
    """Copy a network whole; `copy.deepcopy`, but for tensors without data (PyTorch's fake tensors) too.

    Tensors are cloned before the rest is copied, shared ones once.
    """
    tensors: list[Tensor] = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): _cloned(tensor) for tensor in tensors})


def convert_in_place(network: nn.Module, *args: Any, **kwargs: Any) -> None:
    """``network.to(...)`` within a prediction: weights that can be trained stay so, inference tensors stay those."""
    inference = any(parameter.is_inference() for parameter in network.parameters())
    with torch.inference_mode(inference):
        network.to(*args, **kwargs)


def _cloned(tensor: Tensor) -> Tensor:
    clone = tensor.detach().clone()
    return nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
