"""Parameters and operations of a network, counted on shapes only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nnunet_ext.architectures.deployed import NothingToFuseError, fused
from nnunet_ext.benchmark.memory import with_assumed_share


@dataclass(frozen=True)
class Size:
    """Size of a network.

    Args:
        parameters: number of weights.
        macs: multiply-accumulate operations of convolutions and matrix products in one forward pass of one patch,
            in eval mode.
    """

    parameters: int
    macs: int


def measure_size(build: Callable[[], nn.Module], input_channels: int, patch_size: Sequence[int]) -> Size:
    """Count the weights of a network, and its operations for one patch, without allocating either.

    Args:
        build: returns the network; called under fake tensors.
        input_channels: channels of the image.
        patch_size: voxels per axis.
    """
    with FakeTensorMode(), torch.no_grad():
        network = with_assumed_share(build().eval())
        parameters = sum(p.numel() for p in network.parameters())
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, input_channels, *patch_size))
        return Size(parameters, counter.get_total_flops() // 2)


def count_parameters(build: Callable[[], nn.Module]) -> int:
    """Count the weights of a network without allocating them."""
    with FakeTensorMode():
        return sum(p.numel() for p in build().parameters())


def deployed(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a function that builds the network that predicts: in eval mode, fused and folded where it can be."""

    def make() -> nn.Module:
        network = with_assumed_share(build().eval())
        try:
            return fused(network)
        except NothingToFuseError:
            return network

    return make
