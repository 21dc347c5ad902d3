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
        trained_network: Has ``branches``, each of which takes a step.
        standard_patch: Voxels per axis of the whole patch -> of the standard patch that all share.
        expanded_patches: Function of each branch: voxels per axis of the whole patch -> of its expanded patch.
        step_of: A branch, voxels per axis of its expanded patch -> of the standard one -> its step: `TwoPasses`, or a
            module of a single pass.

    Shape: (B, C, *patch) -> logits by the last branch.
    """

    def __init__(
        self,
        trained_network: Any,
        standard_patch: Callable[[Sequence[int]], Sequence[int]],
        expanded_patches: Sequence[Callable[[Sequence[int]], Sequence[int]]],
        step_of: Callable[[nn.Module, Callable[[Sequence[int]], Sequence[int]]], nn.Module] = TwoPasses,
    ) -> None:
        super().__init__()
        self.trained_network = trained_network
        self.standard_patch, self.expanded_patches = standard_patch, expanded_patches
        self._standard: Sequence[int] = ()  # of the patch that runs
        self.steps = [step_of(branch, lambda _: self._standard) for branch in trained_network.branches]

    def passes(self, x: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """All passes of each branch; one of the branch itself where nothing is expanded."""
        whole = tuple(x.shape[2:])
        self._standard = tuple(self.standard_patch(whole))
        for branch, step, expanded_patch in zip(
            self.trained_network.branches, self.steps, self.expanded_patches, strict=True
        ):
            data = centre_crop(x, tuple(expanded_patch(whole)))
            if tuple(data.shape[2:]) == self._standard:
                yield branch, data
            elif isinstance(step, _Passes):
                yield from step.passes(data)
            else:
                yield step, data

    def parts(self) -> Iterator[nn.Module]:
        """What the steps run."""
        for step, branch in zip(self.steps, self.trained_network.branches, strict=True):
            yield from step.parts() if isinstance(step, _Passes) else (step, branch)
