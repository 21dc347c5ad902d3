"""Wrong gradients, planted: that the gate finds them proves that it can fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nnunet_ext.architectures.reversible.recomputation import can_recompute
from nnunet_ext.doctor.gradients.cases import ORDINARY
from nnunet_ext.doctor.gradients.gate import Gate, Measured
from nnunet_ext.doctor.gradients.step import Source

# Wherever it recomputes; only where it is compiled; only under autocast; even where all is kept, as if the reference
# were as wrong as what it is compared with.
Place = Literal["eager", "compiled", "autocast", "reference"]
PLACES: tuple[Place, ...] = get_args(Place)


class WrongBackward(torch.autograd.Function):
    """A rectifier whose gradient is half of what it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Rectify."""
        ctx.save_for_backward(x)
        return nn.functional.leaky_relu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Lose a half."""
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, gradient, 0.01 * gradient) / 2


class Planted(nn.Module):
    """Two convolutions with a rectifier between them, whose gradient is wrong in one place.

    Args:
        place: Where.
    """

    def __init__(self, place: Place | None) -> None:
        super().__init__()
        self.place = place
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        y = self.first(x)
        y = WrongBackward.apply(y) if self._is_wrong(y) else nn.functional.leaky_relu(y)
        logits: Tensor = self.second(y)
        return logits

    def _is_wrong(self, y: Tensor) -> bool:
        if self.place == "reference" or not can_recompute():
            return self.place == "reference"
        if self.place == "compiled":
            return bool(torch.compiler.is_compiling())
        if self.place == "autocast":
            return y.dtype in (torch.float16, torch.bfloat16)
        return self.place == "eager"


def source(place: Place | None) -> Source:
    """A step of it; None: nothing is wrong."""
    return Source(build=lambda _: Planted(place), form=lambda network: network, shape=(2, 1, 8, 8))


def missed(device: str, backend: str) -> list[str]:
    """Places in which the gate finds nothing, or something where nothing is planted; none of them is expected."""
    found: list[str] = [place for place in PLACES if not any(_wrong(place, device, backend))]
    return found + ["nowhere"] * any(_wrong(None, device, backend))


def _wrong(place: Place | None, device: str, backend: str) -> Iterator[bool]:
    gate = Gate(source(place), device)
    measured: Iterator[Measured] = gate.compiled(backend, [ORDINARY]) if place == "compiled" else gate.eager([ORDINARY])
    for entry in measured:
        yield entry.difference.is_wrong
