"""What a network computes with, kept to tell later whether any of it has changed.

Version counters do not tell: writes through ``.data`` and fused optimisers pass them by, inference tensors have none,
and hyper-parameters are no tensors. So contents are compared, which costs one read of the weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, tuple, type(None))


@dataclass(frozen=True)
class Snapshot:
    """Modules of a network with their settings, and copies of its parameters and buffers.

    Args:
        settings: Modules in order, each with its public attributes that are numbers, words, tuples or None.
        tensors: Copies of parameters and buffers.
    """

    settings: Sequence[tuple[nn.Module, dict[str, Any]]]
    tensors: Sequence[Tensor]

    @classmethod
    def of(cls, network: nn.Module) -> Snapshot:
        """Take one."""
        return cls(_settings(network), [tensor.detach().clone() for tensor in _tensors(network)])

    def fits(self, network: nn.Module) -> bool:
        """Whether nothing has changed since. Tensors without contents (PyTorch's fake ones) never fit."""
        return self.settings == _settings(network) and _equal(_tensors(network), self.tensors)


def _settings(network: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    return [(module, _public(vars(module))) for module in network.modules()]


def _public(attributes: dict[str, Any]) -> dict[str, Any]:
    return {key: v for key, v in attributes.items() if type(v) in _PLAIN and not key.startswith("_")}


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _equal(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> bool:
    same_kinds = [_kind(t) for t in tensors] == [_kind(c) for c in copies]
    if not same_kinds or any(type(c) is not Tensor for c in copies):
        return False
    if all(t.device.type == "cpu" for t in tensors):
        return all(map(torch.equal, tensors, copies))
    # Elsewhere each comparison waits for the device: as few as there are kinds of tensors.
    return all(map(torch.equal, _joined(tensors), _joined(copies)))


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One tensor for each device and type."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype, tensor.device].append(tensor.flatten())
    return [torch.cat(group) for group in groups.values()]
