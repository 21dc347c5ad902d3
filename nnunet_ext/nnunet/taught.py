"""A training step that another network teaches, as a module: what is counted and timed of a distilled trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnunet_ext.protocols import DrawsInputs


class Taught(NamedTuple):
    """Output of a student, and the logits of its teacher at the same voxels."""

    output: Any
    teacher: Tensor


class TaughtNetwork(nn.Module):
    """The teacher's forward pass without gradient, then the student's.

    Args:
        trained_network: Student.
        teacher: Its teacher; no part of the module, so that weights and gradients are the student's.
        at_outputs: Gives the teacher's logits at the student's outputs, see `HasTeacher`.

    Shape: (B, C, *patch) -> `Taught`.
    """

    def __init__(
        self, trained_network: nn.Module, teacher: nn.Module, at_outputs: Callable[[Tensor, Mapping[str, Any]], Tensor]
    ) -> None:
        super().__init__()
        self.trained_network = trained_network
        self._teacher, self._at_outputs = [teacher.eval().requires_grad_(False)], at_outputs
        if isinstance(trained_network, DrawsInputs):
            self.training_inputs = trained_network.training_inputs

    def forward(self, x: Tensor, **drawn: Any) -> Taught:
        """Run both."""
        with torch.no_grad():
            lesson = self._at_outputs(self._teacher[0](x), drawn)
        return Taught(self.trained_network(x, **drawn), lesson)

    def _apply(self, *arguments: Any, **options: Any) -> TaughtNetwork:
        self._teacher[0]._apply(*arguments, **options)
        return super()._apply(*arguments, **options)
