"""Norm, dropout and nonlinearity of plans, tried on a small feature map before a network is made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from nnunet_ext.architectures.common.plan_values import check_finite
from nnunet_ext.printable import typed_line

_CHANNELS = 3  # of the map; a norm is built from them, what else is built from nothing
# What a layer says when it does not take its arguments, or the map.
_OBJECTIONS = (TypeError, ValueError, RuntimeError, AssertionError, IndexError, NotImplementedError)


def check_conv(conv_op: type[Any]) -> None:
    """Refuse what is no convolution of two or three axes.

    Raises:
        ValueError: names the class.
    """
    if not issubclass(conv_op, (nn.Conv2d, nn.Conv3d)):
        raise ValueError(
            f"conv_op must be torch.nn.modules.conv.Conv2d or Conv3d, got {conv_op.__name__}: plan the data set again."
        )


def check_operation(name: str, operation: type[Any] | None, options: Mapping[str, Any], dim: int) -> None:
    """Refuse a layer that can't run between the convolutions; those that PyTorch does not have are left alone.

    Args:
        name: "norm_op", "dropout_op" or "nonlin".
        operation: Class of the layer; None: there is none.
        options: Keyword arguments of it.
        dim: Axes of a feature map.

    Raises:
        ValueError: what it is, and what it objects to.
    """
    check_finite(f"{name}_kwargs", options)
    if operation is None or not operation.__module__.startswith("torch."):
        return
    of_axes = re.search(r"(\d)d$", operation.__name__)
    if issubclass(operation, _NormBase) and of_axes and int(of_axes[1]) != dim:
        raise ValueError(
            f"{name} must be a norm of {dim} axes, as the convolutions are, got {operation.__name__}: use "
            f"{operation.__name__[:-2]}{dim}d."
        )
    said = f"{operation.__name__} with {dict(options)!r:.80}"
    cure = "use what nnU-Net plans, instance norm, LeakyReLU and no dropout"
    try:
        channels = options.get("num_parameters", _CHANNELS)  # of PReLU
        channels = channels if isinstance(channels, int) and channels > 1 else _CHANNELS
        layer = operation(*([channels] if name == "norm_op" else []), **options).eval()
        found = _tried(layer, channels, dim)
    except _OBJECTIONS as error:
        raise ValueError(
            f"{name} must run on feature maps of {dim} axes, got {said}, which objects ({typed_line(error):.200}): "
            f"{cure}."
        ) from error
    if not isinstance(found, Tensor) or tuple(found.shape) != (1, channels, *[2] * dim):
        raise ValueError(f"{name} must keep the shape of a feature map, got {said}, which does not: {cure}.")
    has_numbers = type(found) is Tensor and not found.is_meta  # memory is counted on tensors without
    if has_numbers and not found.isfinite().all():
        raise ValueError(f"{name} must keep a feature map finite, got {said}, which does not: {cure}.")
    _check_numbers(name, layer)


def _tried(layer: nn.Module, channels: int, dim: int) -> Any:
    with torch.no_grad():  # in evaluation, so that no random number is drawn
        return layer(torch.linspace(-1, 1, channels * 2**dim).reshape(1, channels, *[2] * dim))


def _check_numbers(name: str, layer: nn.Module) -> None:
    """Refuse what lets nothing pass, makes a norm's output infinite or a variance negative."""
    if isinstance(layer, _DropoutNd) and not layer.p < 1:
        raise ValueError(f"The p of {name} must lie in 0 to below 1, got {layer.p}, which drops all: use null.")
    if not isinstance(layer, (_InstanceNorm, _BatchNorm)):
        return
    if not layer.eps > 0:
        raise ValueError(f"The eps of {name} must be above 0, got {layer.eps}: use 1e-5, as nnU-Net does.")
    if layer.momentum is not None and not 0 <= layer.momentum <= 1:
        raise ValueError(f"The momentum of {name} must lie in 0 to 1, got {layer.momentum}: use 0.1.")
