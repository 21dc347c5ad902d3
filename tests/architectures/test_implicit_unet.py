"""The network: what it costs, what it gives, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

from nnunet_ext.architectures.implicit.point_sampling import at_points
from nnunet_ext.architectures.implicit_unet import ImplicitUNet
from nnunet_ext.memory.network import ASSUMED_SHARE, count_parameters, measure_inference, measure_size, measure_step
from tests.contract.plans import DEFAULT, PATCHES, arguments, isotropic

SMALL = {"decoder_width": 16, "decoder_depth": 4}


def network(case: str = "3d", **options: Any) -> ImplicitUNet:
    torch.manual_seed(0)
    made = ImplicitUNet(2, 3, **arguments(case), **{**SMALL, **options})
    return made.apply(made.initialize)


def image(case: str = "3d", batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 2, *PATCHES[case])


def points(case: str = "3d", n: int = 50, batch: int = 2) -> Tensor:
    torch.manual_seed(2)
    return torch.stack([torch.randint(size, (batch, n)) for size in PATCHES[case]], -1)


def full_size(dim: int = 3, **changes: Any) -> dict[str, Any]:
    """nnU-Net's plans for an isotropic data set at 8 GB."""
    features = DEFAULT if dim == 3 else [32, 64, 128, 256, 512, 512, 512, 512]
    return isotropic(features, dim, **{"deep_supervision": True, **changes})


def default() -> nn.Module:
    return PlainConvUNet(input_channels=1, num_classes=3, **full_size())


def implicit(**options: Any) -> ImplicitUNet:
    return ImplicitUNet(1, 3, **full_size(), **options)


@pytest.mark.parametrize(("width", "millions", "share"), [(512, 12.9, 0.41), (256, 11.1, 0.35)])
def test_parameters_are_a_fraction_of_the_default_network(width: int, millions: float, share: float) -> None:
    ours = count_parameters(lambda: implicit(decoder_width=width))
    assert ours / 1e6 == pytest.approx(millions, abs=0.05)
    assert round(ours / count_parameters(default), 2) == share


@pytest.mark.parametrize(("width", "most"), [(512, 0.60), (256, 0.52)])
def test_training_with_30000_points_keeps_less_than_default_nnunet(width: int, most: float) -> None:
    ours = measure_step(lambda: implicit(decoder_width=width), 1, (128,) * 3)
    theirs = measure_step(default, 1, (128,) * 3)
    assert ours.held <= most * theirs.held
    assert ours.peak <= most * theirs.peak


def test_split_and_fused_dropout_keep_a_third_of_the_bytes_per_point() -> None:
    def bytes_per_point(**options: Any) -> float:
        held = [
            measure_step(lambda n=n: implicit(n_points=n, **options), 1, (128,) * 3, 1).held for n in (20_000, 30_000)
        ]
        return (held[1] - held[0]) / 10_000

    assert bytes_per_point() < 18_500
    assert bytes_per_point(split=False) < 27_500


def test_counted_elements_are_those_of_the_encoder_and_of_the_points() -> None:
    counted = [implicit(decoder_width=width).compute_conv_feature_map_size((96, 96, 96)) for width in (256, 512)]
    layers = len(implicit().point_decoder.layers)
    assert counted[1] - counted[0] == 256 * layers * 30_000


def test_sparse_prediction_has_fewer_operations_than_default_nnunet() -> None:
    lite = measure_size(lambda: implicit(decoder_width=256), 1, (128,) * 3)
    assert ASSUMED_SHARE == 0.1
    assert lite.macs <= 0.75 * measure_size(default, 1, (128,) * 3).macs


def test_prediction_of_a_patch_needs_less_memory_than_default_nnunet() -> None:
    ours, theirs = (measure_inference(build, 1, (128,) * 3) for build in (implicit, default))
    assert ours <= theirs


@pytest.mark.parametrize("case", PATCHES)
def test_logits_at_points_are_dense_logits_there(case: str) -> None:
    made = network(case, sparse=False).eval()
    with torch.no_grad():
        dense, found = made(image(case)), made(image(case), points=points(case))
    assert found.shape == (2, 3, 50)
    torch.testing.assert_close(found, at_points(dense, points(case)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", PATCHES)
def test_sparse_prediction_of_an_untrained_network_is_dense(case: str) -> None:
    """It is unsure everywhere, so everything is refined."""
    sparse, dense = network(case).eval(), network(case, sparse=False).eval()
    with torch.inference_mode():
        torch.testing.assert_close(sparse(image(case)), dense(image(case)), rtol=1e-4, atol=1e-5)
    assert sparse.refined_share() == 1


def certain(made: ImplicitUNet) -> ImplicitUNet:
    """Make the network sure of class 0 everywhere."""
    with torch.no_grad():
        made.point_decoder.seg_layers.weight.mul_(1e-3)
        made.point_decoder.seg_layers.bias.copy_(torch.tensor([20.0, 0.0, 0.0]))
    return made


def test_refined_share_is_that_since_the_last_reset() -> None:
    made = network().eval()
    assert made.refined_share() is None
    with torch.inference_mode():
        made(image())
        assert made.refined_share() == 1
        certain(made)(image())
        assert made.refined_share(reset=True) == 0.5
        made(image())
        assert made.refined_share() == 0
        made.assume_refined_share(0.25)
        made(image())
    assert made.refined_share() == 0.125


def test_gradients_flow_through_sparse_prediction() -> None:
    made, x = network().eval(), image().requires_grad_()
    made(x).square().mean().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_chunk_size_bounds_the_memory_of_dense_prediction() -> None:
    large, small = (
        measure_inference(lambda n=n: implicit(sparse=False, chunk_size=n), 1, (96,) * 3) for n in (2**18, 2**14)
    )
    assert small < large


def test_only_stages_up_to_the_largest_stride_are_taken() -> None:
    assert len(implicit().encoder.stages) == 5
    assert len(implicit(max_stride=4).encoder.stages) == 3
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]]
    thick = ImplicitUNet(1, 2, **{**full_size(), "strides": strides})
    assert thick.point_decoder.strides[-1] == (8, 16, 16)
    assert thick.mesh_spacing == (2, 4, 4)


def test_convolutions_per_stage_are_those_of_the_paper_or_asked_for() -> None:
    def depths(**options: Any) -> list[int]:
        return [len(stage[0].convs) for stage in implicit(**options).encoder.stages]

    assert depths() == [2, 2, 4, 4, 1]
    assert depths(convs_per_stage=[1, 3]) == [1, 3, 3, 3, 3]
    assert depths(convs_per_stage=2) == [2] * 5


@pytest.mark.parametrize("case", ["3d", "2d"])
def test_smoothing_averages_three_voxels_per_axis(case: str) -> None:
    plain, smooth = (network(case, smooth=s).eval() for s in (False, True))
    with torch.inference_mode():
        window = plain(image(case))[(..., *[slice(4, 7)] * len(PATCHES[case]))]
        found = smooth(image(case))[(..., *[5] * len(PATCHES[case]))]
    torch.testing.assert_close(found, window.flatten(2).mean(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch", [(1, 8, 8), (2, 8, 8), (8, 1, 16), (3, 8, 8)])
def test_smoothing_of_short_axes_averages_what_there_is(patch: tuple[int, ...]) -> None:
    x = torch.randn(1, 2, *patch)
    with torch.inference_mode():
        plain, smooth = (network("3d", smooth=s).eval()(x) for s in (False, True))
    corner = plain[(..., *[slice(min(2, n)) for n in patch])]
    torch.testing.assert_close(smooth[..., 0, 0, 0], corner.flatten(2).mean(2), rtol=1e-4, atol=1e-5)


def test_compiled_network_gives_the_same_at_points_and_in_evaluation() -> None:
    torch._dynamo.reset()
    made = network(dropout=0.0)
    compiled = torch.compile(made, backend="aot_eager")
    torch.testing.assert_close(compiled(image(), points=points()), made(image(), points=points()))
    made.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(image()), made(image()))


def test_dropout_acts_in_training_alone() -> None:
    made, x, p = network(dropout=0.5), image(), points()
    with torch.no_grad():
        assert (made(x, points=p) - made(x, points=p)).abs().max() > 0.01
        made.eval()
        torch.testing.assert_close(made(x, points=p), made(x, points=p), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 5, 2, dtype=torch.int64), r"points must be \(2, K, 3\) with K > 0, got \(2, 5, 2\)"),
        (torch.zeros(1, 5, 3, dtype=torch.int64), r"points must be \(2, K, 3\)"),
        (torch.zeros(2, 0, 3, dtype=torch.int64), "with K > 0"),
        (torch.zeros(2, 5, 3), r"points must be int64 voxel indices, got torch\.float32"),
    ],
)
def test_points_of_another_shape_or_type_are_refused(given: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network()(image(), points=given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_width": 0}, "decoder_width must be at least 1, got 0"),
        ({"mesh_spacing": 0}, "mesh_spacing must be at least 1, got 0"),
        ({"mesh_spacing": [4, 4]}, "mesh_spacing needs 3 numbers, one per axis"),
        ({"dropout": 1.0}, r"dropout must lie in 0 to below 1, got 1\.0"),
        ({"n_points": 0}, "n_points must be at least 1"),
        ({"kernel_sizes": [2, 3, 3]}, "Kernels must be odd"),
        ({"strides": [1, 2]}, r"strides needs one number or 3 of them \(n_stages\), got \[1, 2\]"),
        ({"convs_per_stage": [0]}, "convs_per_stage must be at least 1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImplicitUNet(2, 3, **{**arguments("3d"), **SMALL, **changes})
