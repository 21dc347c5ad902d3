"""Derivatives of a step's loss along a direction: by its gradients, and by differences of the loss itself.

No backward pass of anybody takes part in the second number: what a network recomputes, and what a reference does not,
can't be wrong in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_ext.doctor.gradients.cases import ORDINARY
from nnunet_ext.doctor.gradients.step import Step

# Of a central difference in float64. Kinks of a rectifier between both ends are the rarer, the smaller it is; rounding
# costs about eight digits.
_WIDTH = 1e-8
_DIRECTIONS = 3  # a kink disturbs one of them, a wrong gradient all
TOLERANCE = 1e-4


def slope_error(step: Step) -> float:
    """Largest relative difference between both derivatives over the passes of a step, in the best direction.

    Args:
        step: In float64, not compiled; only what has a gradient is moved.
    """
    found = float("inf")
    for seed in range(_DIRECTIONS):
        found = min(found, _error(step, seed))
        if found <= TOLERANCE:
            break
    return found


def _error(step: Step, seed: int) -> float:
    x = step.input(ORDINARY)
    leaves: Sequence[Tensor] = [*step.parameters, x]
    worst = 0.0
    for number, loss in enumerate(step.losses(x, ORDINARY)):
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        generator = torch.Generator().manual_seed(seed)
        moved: list[tuple[Tensor, Tensor]] = []
        slope = 0.0
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
                slope += float((gradient * direction).sum())
                moved.append((leaf, direction))
        difference = _difference(step, x, number, moved)
        worst = max(worst, abs(slope - difference) / max(abs(difference), 1e-3))
    return worst


def _difference(step: Step, x: Tensor, number: int, moved: Sequence[tuple[Tensor, Tensor]]) -> float:
    values = []
    for sign in (1.0, -1.0):
        before = [leaf.detach().clone() for leaf, _ in moved]
        with torch.no_grad():
            for leaf, direction in moved:
                leaf.add_(direction, alpha=sign * _WIDTH)
        values.append([loss.item() for loss in step.losses(x, ORDINARY)][number])
        with torch.no_grad():
            for (leaf, _), value in zip(moved, before, strict=True):
                leaf.copy_(value)
    return (values[0] - values[1]) / (2 * _WIDTH)
