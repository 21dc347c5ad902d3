"""Steps between levels are bijections, whatever the strides and the share of channels that goes down."""

from __future__ import annotations

import pytest
import torch

from nnunet_ext.architectures.reversible.levels import Ascend, Descend, Squeeze
from nnunet_ext.architectures.reversible.steps import Pass, Streams, join, part

STRIDES = [(2, 2), (2, 2, 2), (1, 2, 2), (1, 1, 2), (3, 1, 2), (1, 1, 1)]


def image(channels: int, stride: tuple[int, ...]) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, channels, *(6 * n for n in stride), dtype=torch.float64)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("mixing", [False, True])
def test_squeeze_and_its_inverse_cancel(stride: tuple[int, ...], mixing: bool) -> None:
    squeeze, x = Squeeze(3, stride, mixing).double(), image(3, stride)
    y = squeeze(x)
    assert y.shape[2:] == torch.Size([6] * len(stride))
    assert y.numel() == x.numel()
    torch.testing.assert_close(squeeze.inverse(y), x, rtol=0, atol=1e-12 if mixing else 0)


def test_squeeze_gathers_neighbours() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    expected = torch.nn.functional.pixel_unshuffle(x, 2)
    torch.testing.assert_close(Squeeze(1, (2, 2), False)(x), expected, rtol=0, atol=0)


def test_mixing_keeps_lengths() -> None:
    x = image(3, (2, 2, 2))
    y = Squeeze(3, (2, 2, 2), True).double()(x)
    torch.testing.assert_close(y.square().sum(), x.square().sum())
    assert not torch.equal(y, Squeeze(3, (2, 2, 2), False)(x))


def test_mixing_is_float32_under_autocast() -> None:
    squeeze, x = Squeeze(4, (2, 2), True), image(4, (2, 2)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = squeeze(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(squeeze.inverse(y), x, rtol=0, atol=1e-5)


def test_size_that_the_stride_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"its stride \[2, 2\] divides, got \[6, 7\]"):
        Squeeze(1, (2, 2), False)(torch.zeros(1, 1, 6, 7))


@pytest.mark.parametrize("channels", range(1, 8))
def test_channels_that_were_taken_off_are_put_back(channels: int) -> None:
    halves = torch.arange(16.0).view(1, 8, 2).chunk(2, dim=1)
    taken, rest = part(halves, channels)
    assert taken.shape[1] == channels
    for half, again in zip(halves, join(taken, rest), strict=True):
        torch.testing.assert_close(again, half, rtol=0, atol=0)


def test_skip_keeps_no_other_channels_alive() -> None:
    first, second = torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)
    _, (rest, _) = part((first, second), 2)
    assert rest.untyped_storage().nbytes() == rest.numel() * 4


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_descend_and_ascend_invert_each_other_and_themselves(channels: int) -> None:
    squeeze = Squeeze(channels, (1, 2), True).double()
    x = image(4, (1, 2))
    start = Streams(tuple(x.chunk(2, dim=1)))  # type: ignore[arg-type]
    down, up = Descend(squeeze), Ascend(squeeze)
    below = down.run(start, Pass())
    assert sum(half.shape[1] for half in below.halves) == 2 * channels
    assert len(below.skips) == 1
    for again in (down.invert(below), up.run(below, Pass())):
        torch.testing.assert_close(torch.cat(again.halves, dim=1), x, rtol=0, atol=1e-12)
        assert again.skips == ()
