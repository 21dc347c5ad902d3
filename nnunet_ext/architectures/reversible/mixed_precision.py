"""Mixed precision next to float32 streams: what is cast for a convolution is cast again, not kept, for backward.

Under autocast a convolution keeps the low-precision copy of its input. Where the float32 original is kept anyway,
as the output of a reversible sequence, that copy costs half as much again: for the partially reversible U-Net 2.1
instead of 1.4 GiB (tests/architectures/test_reversible_unet.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ext.architectures.common.onednn import is_transformed


def lowered(x: Tensor) -> Tensor:
    """`x` in the dtype of autocast, where it is enabled and `x` is float32; otherwise `x` itself."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def full_precision_products() -> AbstractContextManager[None]:
    """Multiply matrices of float32 in float32, whatever `torch.set_float32_matmul_precision` allows.

    A compiled graph keeps the precision that it was made with.
    """
    return nullcontext() if torch.compiler.is_compiling() else _full_precision_products()


@contextmanager
def _full_precision_products() -> Iterator[None]:
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    switches = [backend for backend in backends if hasattr(backend, "fp32_precision")]  # from PyTorch 2.9 on
    before = [switch.fp32_precision for switch in switches]
    precision = None if switches else torch.get_float32_matmul_precision()
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        if precision is not None:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
        if precision is not None:
            torch.set_float32_matmul_precision(precision)


class _Convolution(torch.autograd.Function):
    """A convolution of `x` in `dtype` that keeps `x` as it came; `geometry` are the arguments of aten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *geometry: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_size = None if bias is None else list(bias.shape)
        ctx.dtype, ctx.geometry = dtype, geometry
        bias = None if bias is None else bias.to(dtype)
        return torch.ops.aten.convolution(x.to(dtype), weight.to(dtype), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
        found = torch.ops.aten.convolution_backward(
            gradient.to(ctx.dtype), x.to(ctx.dtype), weight.to(ctx.dtype), ctx.bias_size, *ctx.geometry, needed
        )
        dtypes = (x.dtype, weight.dtype, weight.dtype)
        gradients = [None if g is None else g.to(dtype) for g, dtype in zip(found, dtypes, strict=True)]
        return (*gradients, None, *(None for _ in ctx.geometry))


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """Return ``conv(x)`` for an `x` that is kept anyway: under autocast no low-precision copy of it is kept.

    Args:
        conv: A convolution or transposed convolution of any dimension.
        x: (B, C, *spatial).
    """
    casts = x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type)
    if not casts or conv.padding_mode != "zeros" or is_transformed():
        return conv(x)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.transposed, conv.output_padding, conv.groups)
    dtype = torch.get_autocast_dtype(x.device.type)
    return _Convolution.apply(x, conv.weight, conv.bias, dtype, *geometry)
