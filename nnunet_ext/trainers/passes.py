"""Training steps of several backward passes as modules: what meU-net's trainers give as their `training_form`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from nnunet_ext.architectures.expanded.partial_pass import ExpandedPass, centre_crop
from nnunet_ext.memory.network import surrogate_loss
from nnunet_ext.protocols import CompilesParts


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
            if isinstance(part, CompilesParts):
                part.compile_levels(*args, **options)
            else:
                part.compile(*args, **options)

    def parts(self) -> Iterator[nn.Module]:
        """Yield what the passes run, each once."""
        raise NotImplementedError


class TwoPasses(_Passes):
    """meU-net's training step: the expanded pass, then the standard one.

    Args:
        trained_network: Takes both passes.
        standard_patch: Voxels per axis of the expanded patch -> of the standard patch.

    Shape: (B, C, *kP) -> logits of P.
    """

    def __init__(self, trained_network: nn.Module, standard_patch: Callable[[Sequence[int]], Sequence[int]]) -> None:
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
        trained_network: Has ``branches``, of which each takes both passes, or one.
        standard_patch: Voxels per axis of the whole patch -> of the standard patch that all share.
        expanded_patches: Function of each branch: voxels per axis of the whole patch -> of its expanded patch.
        one_pass: Each branch takes its expanded patch at full resolution.

    Shape: (B, C, *patch) -> logits of P by the last branch, in one pass of its expanded patch.
    """

    def __init__(
        self,
        trained_network: Any,
        standard_patch: Callable[[Sequence[int]], Sequence[int]],
        expanded_patches: Sequence[Callable[[Sequence[int]], Sequence[int]]],
        one_pass: bool = False,
    ) -> None:
        super().__init__()
        self.trained_network, self.one_pass = trained_network, one_pass
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
            if size != standard and not self.one_pass:
                yield expanded_pass, centre_crop(x, size)
            yield branch, centre_crop(x, size if self.one_pass else standard)

    def parts(self) -> Iterator[nn.Module]:
        """The expanded passes and the branches."""
        yield from (*self.expanded_passes, *self.trained_network.branches)
