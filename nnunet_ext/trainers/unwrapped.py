"""The network inside the wrappers of DDP and `torch.compile`."""

from __future__ import annotations

from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel


def unwrapped(network: nn.Module) -> nn.Module:
    """Take a network out of its wrappers, in whatever order they are."""
    while isinstance(network, (DistributedDataParallel, OptimizedModule)):
        network = network.module if isinstance(network, DistributedDataParallel) else network._orig_mod
    return network
