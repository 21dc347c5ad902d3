"""What a network needs, counted at full size without a GPU: bytes of step and prediction, weights, operations.

Losses and optimisers of trainers are not in these figures; `nnunet_ext.memory.count` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nnunet_ext.architectures.deployed import NothingToFuseError, fused
from nnunet_ext.memory.autocast import CudaAutocast
from nnunet_ext.memory.tracker import StorageTracker
from nnunet_ext.protocols import DrawsInputs, RefinesAsAsked, WrapsNetwork

ASSUMED_SHARE = 0.1  # of a patch that sparse prediction refines; shapes and random weights can't tell


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of one training step without parameters, gradients and optimiser.

    Args:
        held: Bytes alive after the forward pass: outputs and what is kept for backward.
        peak: Largest number of bytes alive at any time of forward and backward, gradients of parameters included.
        parameters: Bytes of the parameters.
    """

    held: int
    peak: int
    parameters: int


def measure_step(
    build: Callable[[], nn.Module],
    input_channels: int,
    patch_size: Sequence[int],
    batch_size: int = 2,
    autocast_dtype: torch.dtype | None = None,
) -> StepMemory:
    """Measure forward and backward of a network in training mode, without allocating.

    Args:
        build: Returns the network; called under fake tensors.
        input_channels: Channels of the image.
        patch_size: Voxels per axis.
        batch_size: Patches per step.
        autocast_dtype: Run the forward pass under autocast of this dtype, float16 with CUDA's choice of dtypes and
            bfloat16 with the CPU's; None: float32.
    """
    with FakeTensorMode():
        network = build().train()
        parameters = sum(p.numel() * p.element_size() for p in network.parameters())
        with StorageTracker() as tracker:
            with _autocast(autocast_dtype):
                outputs = training_outputs(network, torch.empty(batch_size, input_channels, *patch_size))
            held = tracker.current
            loss = surrogate_loss(outputs)
            del outputs
            loss.backward()
            return StepMemory(held=held, peak=tracker.peak, parameters=parameters)


@contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    rules = CudaAutocast() if dtype == torch.float16 else nullcontext()
    with rules, torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        yield


def training_outputs(network: nn.Module, x: Tensor) -> Any:
    """Run a network as training does, with its `training_inputs(x)` where it has them.

    Args:
        network: Network in training mode.
        x: Image (B, C, *patch).
    """
    return network(x, **(network.training_inputs(x) if isinstance(network, DrawsInputs) else {}))


def with_assumed_share(network: nn.Module) -> nn.Module:
    """Let a network whose prediction refines as much as the image asks for refine `ASSUMED_SHARE`; return it."""
    if isinstance(network, RefinesAsAsked):
        network.assume_refined_share(ASSUMED_SHARE)
    return network


def surrogate_loss(outputs: Any) -> Tensor:
    """A loss with a dense gradient and one normalisation over the classes, as cross-entropy has them.

    Args:
        outputs: Logits (B, num_classes, *patch), with deep supervision a list of them; other outputs of training, as
            the reconstruction of a VAE branch, count alike.
    """
    return torch.stack([leaf.logsumexp(1).mean() for leaf in tree_leaves(outputs)]).sum()


def measure_inference(
    build: Callable[[], nn.Module],
    input_channels: int,
    patch_size: Sequence[int],
    autocast_dtype: torch.dtype | None = None,
) -> int:
    """Measure the peak bytes of the forward pass of one patch in eval mode, without allocating; no parameters.

    Args:
        build, input_channels, patch_size, autocast_dtype: Arguments of `measure_step`.
    """
    with FakeTensorMode(), torch.inference_mode():
        network = with_assumed_share(build().eval())
        with StorageTracker() as tracker, _autocast(autocast_dtype):
            network(torch.empty(1, input_channels, *patch_size))
            return tracker.peak


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of a network.

    Args:
        parameters: Number of weights.
        macs: Multiply-accumulate operations of convolutions and matrix products in one forward pass of one patch,
            in eval mode.
    """

    parameters: int
    macs: int


def measure_size(build: Callable[[], nn.Module], input_channels: int, patch_size: Sequence[int]) -> Size:
    """Count the weights of a network, and its operations for one patch, without allocating either.

    Args:
        build: Returns the network; called under fake tensors.
        input_channels: Channels of the image.
        patch_size: Voxels per axis.
    """
    with FakeTensorMode(), torch.no_grad():
        network = with_assumed_share(build().eval())
        parameters = sum(p.numel() for p in network.parameters())
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, input_channels, *patch_size))
        return Size(parameters=parameters, macs=counter.get_total_flops() // 2)


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


def network_name(network: nn.Module) -> str:
    """Class of a network, also where it is wrapped for its training step."""
    if hasattr(network, "trained_network"):
        network = cast(WrapsNetwork, network).trained_network
    return type(network).__name__
