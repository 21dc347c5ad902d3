"""Convolutions of small 3D feature maps on the CPU, by oneDNN.

PyTorch chooses between oneDNN and a generic kernel by B C D H, without W, and so runs coarse 3D feature maps by the
generic one, which takes two to four times as long (`python benchmarks/faster_fusion.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]


def convolve(conv: Any, x: Tensor) -> Tensor:
    """Return ``conv(x)``, in float32 on the CPU and without gradients always by oneDNN where PyTorch has it.

    Args:
        conv: A convolution that is not transposed.
        x: (B, C, *spatial).
    """
    if not _can_choose(conv, x):
        return conv(x)
    geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
    return torch.mkldnn_convolution(x, conv.weight, conv.bias, *geometry)


def is_exporting() -> bool:
    """Whether the network is traced or exported for another program."""
    # From PyTorch 2.7 on; `is_exporting()`, which reads it, is true in every compilation up to 2.11.
    if hasattr(torch.compiler, "_is_exporting_flag"):
        return is_tracing() or torch.compiler._is_exporting_flag
    return is_tracing() or (torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling())


def is_transformed() -> bool:
    """Whether `torch.func` (grad, vmap, jvp) looks on, whose tensors stand for others; no compiler can ask."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def is_observed() -> bool:
    """Whether export, compilation, a counter or fake tensors look on, who shall see the operations they know."""
    return torch.compiler.is_compiling() or is_exporting() or torch._C._len_torch_dispatch_stack() > 0


def _can_choose(conv: Any, x: Tensor) -> bool:
    float32_on_cpu = x.device.type == "cpu" and x.dtype == conv.weight.dtype == torch.float32
    return (
        float32_on_cpu
        and not is_observed()
        and conv.padding_mode == "zeros"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and bool(getattr(torch.backends.mkldnn, "enabled", True))
    )


def computes_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for convolutions in float16 or bfloat16; emulated ones are slow."""
    name = {torch.float16: "_is_mkldnn_fp16_supported", torch.bfloat16: "_is_mkldnn_bf16_supported"}[dtype]
    ask = getattr(torch.ops.mkldnn, name, None)
    return ask is not None and bool(ask())
