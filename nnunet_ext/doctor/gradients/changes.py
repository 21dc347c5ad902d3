"""Changes of a network that make a case of it: a layer in two places, dropout."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import activation
from torch.nn.modules.conv import _ConvNd

_DROPPED = 0.25  # of each feature map


class NotThereError(ValueError):
    """A network has nothing that a case could change."""


def share(network: nn.Module) -> None:
    """Let one layer stand in two places: the first two that are alike.

    Raises:
        NotThereError: there are none.
    """
    seen: dict[str, nn.Module] = {}
    for module in network.modules():
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        first = seen.setdefault(repr(module), module)
        if first is not module:
            _replace(network, module, first)
            return
    raise NotThereError("No two layers of this network are alike.")


def drop(network: nn.Module) -> None:
    """Let dropout follow each activation.

    Raises:
        NotThereError: there is none.
    """
    found = [module for module in network.modules() if _is_activation(module)]
    if not found:
        raise NotThereError("This network has no activation that dropout could follow.")
    for module in found:
        _replace(network, module, nn.Sequential(module, nn.Dropout(_DROPPED)))


def _is_activation(module: nn.Module) -> bool:
    kinds = type(module).__mro__
    return nn.MultiheadAttention not in kinds and any(kind.__module__ == activation.__name__ for kind in kinds)


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module wherever it stands; nnU-Net's blocks hold their layers under two names."""
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
