"""Bytes that meU-net's training step peaks at, measured at full size without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_ext.architectures.blocks.partial_pass import ExpandedPass, centre_crop
from nnunet_ext.benchmark.memory import StorageTracker, surrogate_loss


class _Passes(nn.Module):
    """A training step of several backward passes as a module, for benchmarks.

    Shape: (B, C, *patch) -> output of the last pass, whose backward pass is left to the caller.
    """

    def passes(self, x: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """Yield what has a backward pass of its own, one after the other, with its input."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        """Run what precedes the last backward pass."""
        following = self.passes(x)
        part, data = next(following)
        for after in following:
            surrogate_loss(part(data)).backward()
            part, data = after
        return part(data)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile what the passes run, as the trainers do, and not the step as a whole."""
        for part in self.parts():
            getattr(part, "compile_levels", part.compile)(*args, **options)

    def parts(self) -> Iterator[nn.Module]:
        """Yield what the passes run, each once."""
        raise NotImplementedError


def passes_of(form: nn.Module, x: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield what has a backward pass of its own in a training step, with its input; most trainers have one.

    Args:
        form: what the trainer's `training_form` gives, or the network itself.
        x: (B, C, *patch).
    """
    passes = getattr(form, "passes", None)
    if passes is None:
        yield form, x
    else:
        yield from passes(x)


class TwoPasses(_Passes):
    """meU-net's training step: the expanded pass, then the standard one.

    Args:
        trained_network: takes both passes.
        standard_patch: voxels per axis of the expanded patch -> of the standard patch.

    Shape: (B, C, *kP) -> logits of P.
    """

    def __init__(
        self, trained_network: nn.Module, standard_patch: Callable[[Sequence[int]], Sequence[int]]
    ) -> None:
        super().__init__()
        self.trained_network = trained_network
        self.expanded_pass = ExpandedPass(trained_network)
        self.standard_patch = standard_patch

    def passes(self, x: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """Both passes."""
        yield self.expanded_pass, x
        yield self.trained_network, centre_crop(x, self.standard_patch(x.shape[2:]))

    def parts(self) -> Iterator[nn.Module]:
        """The expanded pass and the network."""
        yield from (self.expanded_pass, self.trained_network)


class InTurn(_Passes):
    """meU-net's training step of a network's branches on centres of one patch, one after the other.

    Args:
        trained_network: has ``branches``, of which each takes both passes.
        standard_patch: voxels per axis of the whole patch -> of the standard patch that all share.
        expanded_patches: for each branch, voxels per axis of the whole patch -> of its expanded patch.

    Shape: (B, C, *patch) -> logits of P by the last branch.
    """

    def __init__(
        self,
        trained_network: Any,
        standard_patch: Callable[[Sequence[int]], Sequence[int]],
        expanded_patches: Sequence[Callable[[Sequence[int]], Sequence[int]]],
    ) -> None:
        super().__init__()
        self.trained_network = trained_network
        self.expanded_passes = [ExpandedPass(branch) for branch in trained_network.branches]
        self.standard_patch, self.expanded_patches = standard_patch, expanded_patches

    def passes(self, x: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """Both passes of each branch; one where nothing is expanded."""
        whole = tuple(x.shape[2:])
        standard = tuple(self.standard_patch(whole))
        for branch, expanded_pass, expanded_patch in zip(
            self.trained_network.branches, self.expanded_passes, self.expanded_patches, strict=True
        ):
            size = tuple(expanded_patch(whole))
            if size != standard:
                yield expanded_pass, centre_crop(x, size)
            yield branch, centre_crop(x, standard)

    def parts(self) -> Iterator[nn.Module]:
        """The expanded passes and the branches."""
        yield from (*self.expanded_passes, *self.trained_network.branches)


def measure_two_passes(
    build: Callable[[], nn.Module],
    input_channels: int,
    patch_size: Sequence[int],
    standard_patch_size: Sequence[int],
    batch_size: int = 2,
    autocast_dtype: torch.dtype | None = None,
) -> tuple[int, int]:
    """Measure the backward passes of the expanded patch, then of its centre.

    Args:
        build: returns the network; called under fake tensors.
        input_channels: channels of the image.
        patch_size: voxels per axis of the expanded patch, kP.
        standard_patch_size: the same of the standard patch, P.
        batch_size: patches per step.
        autocast_dtype: run the forward passes under CPU autocast of this dtype; None: float32.

    Returns:
        Peak of the expanded pass alone, and peak of the whole step, as `measure_step` counts it.
    """
    with FakeTensorMode():
        network = build().train()
        expanded_pass = ExpandedPass(network)
        with StorageTracker() as tracker:

            def run(part: nn.Module, data: Any) -> None:
                enabled = autocast_dtype is not None
                with torch.autocast("cpu", dtype=autocast_dtype or torch.bfloat16, enabled=enabled):
                    outputs = part(data)
                surrogate_loss(outputs).backward()

            data = torch.empty(batch_size, input_channels, *patch_size)
            run(expanded_pass, data)
            expanded = tracker.peak
            run(network, centre_crop(data, standard_patch_size))
            return expanded, tracker.peak
