"""The FasterFusion block: its fused forms equal it, and have the sizes that were counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnunet_ext.architectures.fusion.blocks import FasterFusionBlock, Geometry, fused_block

FORMS = ("hybrid", "t", "dense")
CASES: dict[str, dict[str, Any]] = {
    "3d": {},
    "2d": {"conv_op": nn.Conv2d},
    "strided": {"stride": 2},
    "flat kernel": {"kernel_size": [1, 3, 3], "stride": [1, 2, 2]},
    "max pooling": {"stride": 2, "downsample": "maxpool"},
    "divisor 2": {"divisor": 2},
    "divisor 8": {"divisor": 8, "input_channels": 16},
    "sizes that do not divide": {"input_channels": 11, "output_channels": 9},
    "two inputs": {"input_channels": 16, "inputs": 2},
    "two inputs that do not divide": {"input_channels": 22, "inputs": 2, "divisor": 4},
}


def block(dtype: torch.dtype = torch.float64, conv_bias: bool = True, eps: float = 1e-5, **sizes: Any):
    """A block in evaluation whose norm has seen something."""
    torch.manual_seed(0)
    sizes = {"conv_op": nn.Conv3d, "input_channels": 8, "output_channels": 12, "kernel_size": 3, "stride": 1} | sizes
    made = FasterFusionBlock(
        Geometry(**sizes), conv_bias=conv_bias, norm_op_kwargs={"eps": eps}, nonlin=nn.LeakyReLU(inplace=True)
    )
    nn.init.normal_(made.norm.running_mean)
    nn.init.uniform_(made.norm.running_var, 1e-3, 2)
    nn.init.normal_(made.norm.weight)
    nn.init.normal_(made.norm.bias)
    return made.to(dtype).eval()


def image(made: FasterFusionBlock, sizes: tuple[int, ...] = (7, 9, 5)) -> Tensor:
    g = made.geometry
    return torch.randn(2, g.input_channels, *sizes[: len(g.kernel_size)], dtype=made.spatial.weight.dtype)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_every_form_equals_the_trained_block_also_at_borders_and_odd_sizes(case: str, form: Any) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        made = block(dtype, **CASES[case])
        x = image(made)
        fused = made.fuse(form)
        assert relative(fused(x), made(x)) <= tolerance
        assert {p.dtype for p in fused.parameters()} == {dtype}


@pytest.mark.parametrize("form", FORMS)
def test_eps_of_the_norm_counts(form: Any) -> None:
    made = block(eps=1e-3)
    x = image(made)
    assert relative(made.fuse(form)(x), made(x)) <= 1e-12
    made.norm.eps = 1e-5
    assert relative(block(eps=1e-3).fuse(form)(x), made(x)) > 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["no bias", "no affine"])
def test_missing_biases_and_scales_count_as_zeros_and_ones(change: str, form: Any) -> None:
    made = block(conv_bias=change != "no bias")
    if change == "no affine":
        made.norm.weight = made.norm.bias = None
    x = image(made)
    assert relative(made.fuse(form)(x), made(x)) <= 1e-12


def test_fusing_leaves_the_block_as_it_was() -> None:
    made = block()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    fused = made.fuse()
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_form_of_the_same_sizes_takes_the_weights(form: Any) -> None:
    made = block()
    empty = fused_block(form, made.geometry, nn.LeakyReLU()).double().eval()
    empty.load_state_dict(made.fuse(form).state_dict(), strict=True)
    x = image(made)
    assert relative(empty(x), made(x)) <= 1e-12


def count(module: nn.Module) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if name.endswith("weight") and p.dim() > 1)


@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (64, 128), (256, 64)])
def test_weights_are_those_of_the_equations(inputs: int, outputs: int) -> None:
    made = block(input_channels=inputs, output_channels=outputs)
    product, square = inputs * outputs, outputs**2
    assert count(made) == 4.5 * product + 2 * square
    assert count(made.fuse()) == 4.125 * product + 0.5 * square
    assert count(made.fuse("t")) == 7.5 * product
    assert count(made.fuse("dense")) == 27 * product


@pytest.mark.parametrize("case", CASES)
def test_the_hybrid_form_is_never_larger_than_the_trained_one(case: str) -> None:
    made = block(**CASES[case])
    total = [sum(p.numel() for p in module.parameters()) for module in (made.fuse(), made)]
    assert total[0] <= total[1]


def test_activations_keep_their_size_through_ten_blocks() -> None:
    torch.manual_seed(0)
    g = Geometry(conv_op=nn.Conv3d, input_channels=32, output_channels=32, kernel_size=3, stride=1)
    x = torch.randn(2, 32, 12, 12, 12)
    from nnunet_ext.architectures.faster_fusion_unet import FasterFusionUNet

    for _ in range(10):
        made = FasterFusionBlock(g, nonlin=nn.LeakyReLU(inplace=True)).apply(FasterFusionUNet.initialize).train()
        x = made(x).detach()
        assert 0.75 < float(x.std()) < 0.92  # LeakyReLU of a normal of variance 2: 0.83


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"input_channels": 3}, r"at least 4 channels \(its divisor\).*got 3"),
        ({"input_channels": 9, "inputs": 2}, "2 equal inputs, got 9"),
        ({"divisor": 1}, "at least 2, got 1"),
        ({"kernel_size": 2}, r"odd to keep the size, got \[2, 2, 2\]"),
        ({"downsample": "average"}, "downsample must be .*got 'average'"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block(**sizes)


def test_unknown_forms_and_norms_without_statistics_are_refused() -> None:
    made = block()
    with pytest.raises(ValueError, match="form must be one of hybrid, t, dense, got 'x'"):
        made.fuse("x")
    made.norm.running_mean = None
    with pytest.raises(ValueError, match="running statistics"):
        made.fuse()
