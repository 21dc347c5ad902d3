"""Convolutions that keep the float32 original instead of its low-precision copy, against the plain module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_ext.architectures.reversible.mixed_precision import convolve, lowered
from nnunet_ext.memory.network import measure_step

CONVOLUTIONS = {
    "2d": nn.Conv2d(4, 6, 3, padding=1),
    "strided": nn.Conv3d(4, 6, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
    "transposed": nn.ConvTranspose3d(4, 6, 2, 2, bias=False),
    "head": nn.Conv3d(4, 3, 1),
    "grouped": nn.Conv3d(4, 8, 3, groups=2, padding=1),
    "reflecting": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("autocast", [False, True])
def test_output_and_gradients_equal_the_plain_module(name: str, autocast: bool) -> None:
    conv = CONVOLUTIONS[name]
    x = torch.randn(2, 4, *(8, 8, 8)[: conv.weight.dim() - 2])
    found = []
    for run in (lambda given: convolve(conv, given), conv):
        leaf = x.clone().requires_grad_()
        conv.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = run(leaf)
            loss = y.float().square().sum()
        loss.backward()
        found.append([y.detach(), leaf.grad, *(p.grad.clone() for p in conv.parameters())])
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=0 if not autocast else 1e-2, atol=0 if not autocast else 1e-2)


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    conv = nn.Conv2d(4, 6, 3)
    conv.weight.requires_grad_(False)
    x = torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = convolve(conv, x).float().sum()
    loss.backward()
    assert conv.weight.grad is None
    assert conv.bias.grad is not None


def test_no_copy_is_held_for_backward() -> None:
    class Twice(nn.Module):
        def __init__(self, wrap: bool) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.conv = nn.Conv3d(8, 1, 1)
            self.wrap = wrap

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            stream = x + self.scale
            return [convolve(self.conv, stream) if self.wrap else self.conv(stream), stream]

    copy = 8 * 16**3 * 2
    held = [measure_step(lambda w=w: Twice(w), 8, (16,) * 3, 1, torch.bfloat16).held for w in (False, True)]
    assert held[0] - held[1] == pytest.approx(copy, rel=0.01)


def test_lowered_follows_autocast_and_leaves_other_dtypes() -> None:
    x = torch.randn(2)
    assert lowered(x) is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lowered(x).dtype == torch.bfloat16
        assert lowered(x.double()).dtype == torch.float64
