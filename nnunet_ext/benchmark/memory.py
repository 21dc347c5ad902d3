"""Bytes that a training step holds and peaks at, measured at full size without a GPU.

Under PyTorch's `FakeTensorMode` every operation runs on shapes only; a dispatch mode follows each storage by weak
reference. Convolution workspaces, the allocator's rounding and the CUDA context are not in these figures.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
ASSUMED_SHARE = 0.1  # of a patch that sparse prediction refines; shapes and random weights can't tell


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is entered and still alive.

    Attributes:
        current: bytes alive now.
        peak: largest value of `current` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation and count the storages of its results."""
        result = func(*args, **(kwargs or {}))
        known = {id_ for leaf in tree_leaves((args, kwargs)) if (id_ := _storage_id(leaf)) is not None}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage_id(leaf) not in known:
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()

        def forget(_: Any) -> None:
            self.current -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, forget)
        self.current += size
        self.peak = max(self.peak, self.current)


def _storage_id(leaf: Any) -> int | None:
    return leaf.untyped_storage()._cdata if isinstance(leaf, Tensor) else None


@dataclass(frozen=True)
class StepMemory:
    """Memory of one training step beside parameters, gradients and optimiser.

    Args:
        held: bytes alive after the forward pass: outputs and what is kept for backward.
        peak: largest number of bytes alive at any time of forward and backward, gradients of parameters included.
        parameters: bytes of the parameters.
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
        build: returns the network; called under fake tensors.
        input_channels: channels of the image.
        patch_size: voxels per axis.
        batch_size: patches per step.
        autocast_dtype: run the forward pass under CPU autocast of this dtype; None: float32.
    """
    with FakeTensorMode():
        network = build().train()
        parameters = sum(p.numel() * p.element_size() for p in network.parameters())
        with StorageTracker() as tracker:
            enabled = autocast_dtype is not None
            with torch.autocast("cpu", dtype=autocast_dtype or torch.bfloat16, enabled=enabled):
                outputs = training_outputs(network, torch.empty(batch_size, input_channels, *patch_size))
            held = tracker.current
            loss = surrogate_loss(outputs)
            del outputs
            loss.backward()
            return StepMemory(held, tracker.peak, parameters)


def training_outputs(network: nn.Module, x: Tensor) -> Any:
    """Run a network as training does, with what its `training_inputs(x)` gives beside the image, where it has that.

    Args:
        network: in training mode.
        x: image (B, C, *patch).
    """
    inputs = getattr(network, "training_inputs", None)
    return network(x, **(inputs(x) if callable(inputs) else {}))


def with_assumed_share(network: nn.Module) -> nn.Module:
    """Let a network whose prediction refines as much as the image asks for refine `ASSUMED_SHARE`; return it."""
    assume = getattr(network, "assume_refined_share", None)
    if callable(assume):
        assume(ASSUMED_SHARE)
    return network


def surrogate_loss(outputs: Any) -> Tensor:
    """A loss with a dense gradient and one normalisation over the classes, as cross-entropy has them.

    Args:
        outputs: logits (B, num_classes, *patch), with deep supervision a list of them; what a network gives beside
            logits in training, as the reconstruction of a VAE branch, counts alike.
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
        build, input_channels, patch_size, autocast_dtype: as for `measure_step`.
    """
    with FakeTensorMode(), torch.inference_mode():
        network = with_assumed_share(build().eval())
        enabled = autocast_dtype is not None
        with (
            StorageTracker() as tracker,
            torch.autocast("cpu", autocast_dtype or torch.bfloat16, enabled=enabled),
        ):
            network(torch.empty(1, input_channels, *patch_size))
            return tracker.peak
