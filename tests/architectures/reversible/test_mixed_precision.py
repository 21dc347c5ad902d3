"""What chains keep in low precision, and gradients of convolutions without running them again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnunet_ext.architectures.invertible_unet import InvertibleUNet
from nnunet_ext.architectures.partially_invertible_unet import PartiallyInvertibleUNet
from nnunet_ext.architectures.reversible.mixed_precision import (
    convolution_gradients,
    is_plain_convolution,
    lowered,
    restored,
    rounding_error,
    widened,
)
from nnunet_ext.architectures.reversible_unet import ReversibleUNet
from tests.contract.plans import isotropic

CONVOLUTIONS = {
    "2d": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv3d(4, 6, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
    "transposed": nn.ConvTranspose3d(4, 6, 2, 2, bias=False),
    "head": nn.Conv3d(4, 3, 1),
    "grouped": nn.Conv3d(4, 8, 3, groups=2, padding=1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_of_a_convolution_equal_autograd_s(name: str, dtype: torch.dtype | None) -> None:
    conv = CONVOLUTIONS[name]
    assert is_plain_convolution(conv)
    x = torch.randn(2, 4, *(8, 8, 8)[: conv.weight.dim() - 2]).requires_grad_()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        y = conv(x)
    d_y = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, *conv.parameters()], d_y)
    found = convolution_gradients(conv, x, conv.weight, conv.bias, d_y, dtype=dtype, needs_input=True)
    for ours, plain in zip([g for g in found if g is not None], expected, strict=True):
        assert ours.dtype == plain.dtype
        assert torch.equal(ours, plain)


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    conv = nn.Conv2d(4, 6, 3)
    conv.weight.requires_grad_(False)
    x = torch.randn(1, 4, 8, 8)
    d_x, d_weight, d_bias = convolution_gradients(
        conv, x, conv.weight, conv.bias, torch.ones(1, 6, 6, 6), dtype=None, needs_input=False
    )
    assert d_x is None
    assert d_weight is None
    assert torch.equal(d_bias, torch.full((6,), 36.0))


def test_what_is_more_than_a_convolution_is_run_again() -> None:
    hooked = nn.Conv2d(4, 6, 3)
    hooked.register_forward_hook(lambda module, args, y: 2 * y)
    weighted = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    others = [
        hooked,
        weighted,
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, padding="same"),
    ]
    assert not any(is_plain_convolution(module) for module in others)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 13), (torch.bfloat16, 10)])
def test_rounding_is_taken_back_to_two_more_bits(dtype: torch.dtype, bits: int) -> None:
    x = torch.cat([torch.randn(10000), torch.randn(100) * 1000, torch.randn(100) / 100])
    low = x.to(dtype)
    error = rounding_error(x, low)
    assert error.dtype.itemsize == 1
    assert ((restored(low, error) - x).abs() <= 2.0**-bits * x.abs() + 2.0**-27).all()
    assert rounding_error(x, x) is None
    huge = torch.tensor([6e4, -1e6, 1e30])
    if dtype == torch.bfloat16:
        assert restored(huge.to(dtype), rounding_error(huge, huge.to(dtype))).isfinite().all()


def test_lowered_and_widened_follow_autocast_and_leave_other_dtypes() -> None:
    x = torch.randn(2)
    assert lowered(x) is x
    assert widened(x.half()).dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lowered(x).dtype == torch.bfloat16
        assert lowered(x.double()).dtype == torch.float64
        assert widened(x.half()).dtype == torch.float32
        assert widened(x.double()).dtype == torch.float64


def gradient(network: nn.Module, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """All gradients of a step in one; its loss is scaled, as in training, so that float16 can hold them."""
    network.zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        levels = network(x)
        loss = sum(level.float().logsumexp(1).sub(level[:, 0].float()).mean() for level in levels)
    (1024 * loss).backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()]).double()


@pytest.mark.parametrize("network_class", [ReversibleUNet, InvertibleUNet, PartiallyInvertibleUNet])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "blocks"), [(2, 2), (3, 2), (2, 8), pytest.param(3, 8, marks=pytest.mark.slow)])
def test_gradients_in_low_precision_are_as_close_to_float32_as_without_recomputation(
    network_class: Any, dtype: torch.dtype, dim: int, blocks: int
) -> None:
    errors = torch.zeros(2)
    for seed in range(2):
        torch.manual_seed(seed)
        arguments = isotropic([8, 16, 32], dim, deep_supervision=True, blocks_per_stage=blocks)
        ours, plain = (network_class(1, 3, reversible=reversible, **arguments) for reversible in (True, False))
        ours.apply(ours.initialize)
        plain.load_state_dict(ours.state_dict())
        x = torch.randn(2, 1, *(48, 48) if dim == 2 else (16, 16, 16))
        exact = gradient(plain, x, None)
        errors += torch.stack(
            [(gradient(network, x, dtype) - exact).norm() / exact.norm() for network in (ours, plain)]
        )
    assert errors[0] <= 1.5 * errors[1]
