"""LeakyReLU whose backward pass needs its output, which the convolution behind it keeps anyway, and not its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ext.architectures.reversible.recomputation import can_recompute


class _FromOutput(torch.autograd.Function):
    """Leaky rectifier of a positive slope: the sign of the output is that of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        y = nn.functional.leaky_relu(x, slope)
        ctx.save_for_backward(y)
        ctx.slope = slope
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.leaky_relu_backward(gradient, y, ctx.slope, True), None


class FrugalLeakyReLU(nn.LeakyReLU):
    """`torch.nn.LeakyReLU` that keeps its output for backward, as in place, and leaves its input as it is.

    In place would save as much, but the output of instance norm is a view, of which autograd then makes two copies.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified x."""
        if self.negative_slope > 0 and can_recompute():
            y: Tensor = _FromOutput.apply(x, self.negative_slope)
            return y
        return super().forward(x)
