"""CUDA's choice of dtypes under autocast, for tensors of the CPU.

PyTorch's two lists differ where memory is counted. CUDA normalises and sums in float32, which keeps float32 copies of
the logits for the loss; it interpolates in float32; it pools in float16, which the CPU does in float32; its dropout
keeps a mask of bytes. Convolutions, matrix products and instance norm have the same sizes in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_NORMALISED = {"softmax": torch.ops.aten._softmax, "log_softmax": torch.ops.aten._log_softmax}
_SUMMED = {"sum", "prod", "cumsum"}
_IN_FLOAT32 = {
    *("interpolate", "binary_cross_entropy_with_logits", "mse_loss", "l1_loss", "smooth_l1_loss", "kl_div"),
    *("layer_norm", "group_norm", "exp", "log", "pow", "logsumexp", "softplus", "norm"),
}
_AS_IT_IS = {"max_pool2d", "max_pool3d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool3d"}


class CudaAutocast(TorchFunctionMode):
    """Where CPU autocast of float16 is on, operations get the dtypes that they have on CUDA."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function of PyTorch."""
        options = kwargs or {}
        if func is Tensor.backward:
            return self._backward(args[0])
        name = getattr(func, "__name__", "")
        if not torch.is_autocast_enabled("cpu"):
            return func(*args, **options)
        if name == "dropout":
            return _dropout(func, *args, **options)
        if not args or not isinstance(args[0], Tensor) or args[0].dtype != torch.float16:
            return func(*args, **options)
        return _run(name, func, args, options)

    def _backward(self, loss: Tensor) -> None:
        """Run a backward pass in this mode, which is off in functions: what is recomputed has CUDA's dtypes too."""
        engine: Any = torch.autograd.Variable._execution_engine
        with self:
            gradient = torch.ones_like(loss)
            engine.run_backward((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _run(name: str, func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    x, *others = args
    if name in _NORMALISED and "dtype" not in options:
        return _NORMALISED[name](x, others[0] if others else options["dim"], True)
    if name == "cross_entropy" and not options.get("label_smoothing"):
        return nn.functional.nll_loss(
            torch.ops.aten._log_softmax(x, 1, True),
            *others,
            **{k: v for k, v in options.items() if k != "label_smoothing"},
        )
    if name in _SUMMED and "dtype" not in options:
        return func(*args, **options, dtype=torch.float32)
    if name in _IN_FLOAT32:
        return func(x.float(), *others, **options)
    if name in _AS_IT_IS:
        with torch.autocast("cpu", enabled=False):
            return func(*args, **options)
    return func(*args, **options)


def _dropout(
    func: Callable[..., Any], x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """CUDA's fused dropout where it is used."""
    if not training or not 0 < p < 1 or not x.requires_grad:
        return func(x, p, training, inplace)
    dropped: Tensor = torch.ops.aten.native_dropout(x, p, True)[0]
    return dropped


@contextmanager
def mixed_precision(device: str, enabled: bool = True) -> Iterator[None]:
    """Autocast of float16 as nnU-Net trains on CUDA, on "cpu" with the sizes of CUDA inside `CudaAutocast`."""
    with torch.autocast(device, dtype=torch.float16, enabled=enabled):
        yield
