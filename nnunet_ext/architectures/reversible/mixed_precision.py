"""Mixed precision of reversible chains: what is kept has low precision, streams are float32 while they are walked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ext.architectures.common.onednn import is_transformed


def lowered(x: Tensor) -> Tensor:
    """`x` in the dtype of autocast, where it is enabled and `x` is float32; otherwise `x` itself.

    Not within `torch.func`, whose convolutions then refuse a bias of float32.
    """
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type) and not is_transformed():
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def widened(x: Tensor) -> Tensor:
    """`x` in float32, where autocast is enabled and `x` is of lower precision; otherwise `x` itself."""
    if x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(x.device.type):
        return x.float()
    return x


_SCALE = 2.0**10  # brings what rounding to float16 leaves of numbers about one into the range of an 8-bit float
_LARGEST = torch.finfo(torch.float8_e5m2).max


def rounding_error(x: Tensor, low: Tensor) -> Tensor | None:
    """What was lost when `x` became `low`, in 8 bits a number; None where nothing was.

    A walk back starts from what is kept. Without these bits the rounding of the last feature map runs through all
    inversions before it, and adds as much error to the gradients as the low precision of the convolutions does
    (tests/architectures/reversible/test_mixed_precision.py).
    """
    if low.dtype == x.dtype or x.device.type == "mps":  # which has no such dtype
        return None
    return (x - low).mul_(_SCALE).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e5m2)


def restored(low: Tensor, error: Tensor | None) -> Tensor:
    """`low` in float32, with its rounding error taken back."""
    x = low.float()
    return x if error is None else x.add_(error.float(), alpha=1 / _SCALE)


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


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether a module computes `torch.ops.aten.convolution` of its own weights and nothing else."""
    plain = type(module) in _CONVOLUTIONS and module.padding_mode == "zeros" and isinstance(module.padding, tuple)
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return plain and not hooked and set(module._parameters) == {"weight", "bias"}


def convolution_gradients(
    conv: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient: Tensor,
    *,
    dtype: torch.dtype | None,
    needs_input: bool,
) -> list[Tensor | None]:
    """Gradients of x, weight and bias for ``conv(x)``; None where none is wanted.

    Args:
        conv: A plain convolution or transposed convolution of any dimension.
        x: (B, C, *spatial).
        weight, bias: Those that it was evaluated with.
        gradient: Gradient of the result.
        dtype: Dtype in which autocast evaluated it; None: that of x.
        needs_input: Whether the gradient of x is wanted.
    """
    geometry = (conv.stride, conv.padding, conv.dilation, conv.transposed, conv.output_padding, conv.groups)
    dtype = x.dtype if dtype is None or x.dtype == torch.float64 else dtype  # which autocast leaves as it is
    needed = [needs_input, weight.requires_grad, bias is not None and bias.requires_grad]
    found = torch.ops.aten.convolution_backward(
        gradient.to(dtype),
        x.to(dtype),
        weight.detach().to(dtype),
        None if bias is None else list(bias.shape),
        *geometry,
        needed,
    )
    wanted = zip(found, (x.dtype, weight.dtype, weight.dtype), needed, strict=True)
    return [g.to(d) if is_needed else None for g, d, is_needed in wanted]
