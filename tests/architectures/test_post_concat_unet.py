"""The post-concatenation network beside nnU-Net's own: equal without the prior, small, its encoder blind to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from nnunet_ext.architectures.post_concat_unet import PostConcatUNet
from nnunet_ext.memory.network import measure_step
from tests.contract.plans import DEFAULT, PATCHES, arguments, sizes

CHANNELS, CLASSES = 2, 3


def host_of(case: str, channels: int = CHANNELS, classes: int = CLASSES, **options: Any) -> nn.Module:
    host_class = ResidualEncoderUNet if case == "resenc" else PlainConvUNet
    network = host_class(input_channels=channels, num_classes=classes, **{**arguments(case), **options})
    network.apply(network.initialize)
    return network


def ours_of(case: str, prior: int, classes: int = CLASSES, **options: Any) -> PostConcatUNet:
    network = PostConcatUNet(CHANNELS + prior, classes, prior_channels=prior, **{**arguments(case), **options})
    network.apply(network.initialize)
    return network


def load_host(network: PostConcatUNet, host: nn.Module) -> None:
    """The host's weights, and zeros for the prior: the last inputs of each decoder stage's first convolution."""
    weights = host.state_dict()
    for name, wanted in network.state_dict().items():
        missing = wanted.shape[1] - weights[name].shape[1] if wanted.dim() > 1 else 0
        if missing:
            zeros = torch.zeros(wanted.shape[0], missing, *wanted.shape[2:], dtype=wanted.dtype)
            weights[name] = torch.cat((weights[name], zeros), dim=1)
    network.load_state_dict(weights, strict=True)


def batch(case: str, prior: int) -> Tensor:
    torch.manual_seed(1)
    image, labels = torch.randn(2, CHANNELS, *PATCHES[case]), torch.rand(2, prior, *PATCHES[case]) > 0.5
    return torch.cat((image, labels.float()), dim=1)


@pytest.mark.parametrize("case", PATCHES)
@pytest.mark.parametrize("prior", [1, 2, 14])
@pytest.mark.parametrize("resampling", ["nearest", "max"])
def test_with_zero_weights_on_the_prior_it_is_the_default_network(case: str, prior: int, resampling: str) -> None:
    host = host_of(case, deep_supervision=True)
    network = ours_of(case, prior, deep_supervision=True, prior_resampling=resampling)
    load_host(network, host)
    x = batch(case, prior)
    for found, expected in zip(network(x), host(x[:, :CHANNELS]), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for module in (network, host):
        module.eval()
        module.decoder.deep_supervision = False
    torch.testing.assert_close(network(x), host(x[:, :CHANNELS]), rtol=0, atol=0)


@pytest.mark.parametrize("labels", [1, 2, 14])
@pytest.mark.parametrize("case", ["3d", "2d", "resenc"])
def test_it_has_at_most_one_percent_more_parameters(labels: int, case: str) -> None:
    options = sizes(DEFAULT, 2 if case == "2d" else 3)
    if case == "resenc":
        options.update(n_blocks_per_stage=[1, 3, 4, 6, 6, 6], n_conv_per_stage_decoder=[1] * 5)
        del options["n_conv_per_stage"]
    with torch.device("meta"):
        networks = host_of(case, classes=labels + 1, **options), ours_of(case, labels, labels + 1, **options)
    host, ours = (sum(p.numel() for p in network.parameters()) for network in networks)
    assert host < ours <= 1.01 * host


@pytest.mark.parametrize("case", PATCHES)
def test_the_encoder_is_independent_of_the_prior(case: str) -> None:
    network = ours_of(case, 2)
    x = batch(case, 2)
    other = x.clone()
    other[:, CHANNELS:] = 1 - other[:, CHANNELS:]
    seen: list[Any] = []
    network.encoder.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    assert not torch.equal(network(x), network(other))  # the decoder is not
    for one, two in zip(*(skips for _, skips in seen), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    x.requires_grad_()
    network(x)
    image, skips = seen[-1]
    (gradient,) = torch.autograd.grad(sum(skip.square().sum() for skip in skips), x)
    assert gradient[:, :CHANNELS].any()
    assert not gradient[:, CHANNELS:].any()
    assert image.shape[1] == CHANNELS


def test_every_decoder_level_sees_the_prior_at_its_own_resolution() -> None:
    network = ours_of("anisotropic", 2, deep_supervision=True)
    x = batch("anisotropic", 2)
    inputs: list[Tensor] = []
    for stage in network.decoder.stages:
        stage.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    network(x)
    scales = [[1, 1, 1], [1, 0.5, 0.5]]
    expected = DownsampleSegForDSTransform(scales)._apply_to_segmentation(x[0, CHANNELS:])
    for found, wanted in zip(inputs[::-1], expected, strict=True):
        torch.testing.assert_close(found[0, -2:], wanted, rtol=0, atol=0)


def test_max_resampling_keeps_a_single_voxel_at_every_level() -> None:
    prior = torch.zeros(1, 1, 16, 16, 16)
    prior[0, 0, 5, 6, 9] = 1
    for resampling, kept in (("max", True), ("nearest", False)):
        decoder = ours_of("3d", 1, prior_resampling=resampling).decoder
        coarse = decoder._at_level(prior, [2, 2, 2])
        assert bool(coarse.any()) is kept
        assert coarse.shape[2:] == (8, 8, 8)


@pytest.mark.parametrize("case", PATCHES)
def test_pre_concatenation_is_the_ordinary_network_on_all_channels(case: str) -> None:
    network, host = ours_of(case, 2, fusion="pre"), host_of(case, CHANNELS + 2)
    network.load_state_dict(host.state_dict(), strict=True)
    x = batch(case, 2)
    torch.testing.assert_close(network(x), host(x), rtol=0, atol=0)


def test_a_prior_reaches_the_output_also_in_mixed_precision() -> None:
    network = ours_of("3d", 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(batch("3d", 2))
    logits.float().square().mean().backward()
    weight = network.decoder.stages[-1].convs[0].conv.weight
    assert weight.grad[:, -2:].abs().sum() > 0


def test_its_training_step_needs_hardly_more_memory_than_the_default() -> None:
    def peak(network_of: Any, channels: int) -> int:
        return measure_step(network_of, channels, (64, 64, 64)).peak

    ours = peak(lambda: ours_of("3d", 2, deep_supervision=True, **sizes(DEFAULT)), CHANNELS + 2)
    assert ours <= 1.02 * peak(lambda: host_of("3d", deep_supervision=True, **sizes(DEFAULT)), CHANNELS)


def test_the_planner_counts_the_prior_of_every_level() -> None:
    patch = PATCHES["3d"]
    ours, host = ours_of("3d", 2), host_of("3d")
    surplus = ours.compute_conv_feature_map_size(patch) - host.compute_conv_feature_map_size(patch)
    assert surplus == 2 * (16**3 + 8**3)


def test_an_input_without_the_prior_is_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match=r"2 channels of the image and 2 of the previous .* got 2 in all.*prev_stage"):
        ours_of("3d", 2)(torch.randn(1, 2, 16, 16, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "late"}, 'fusion must be "post" or "pre", got \'late\''),
        ({"prior_resampling": "linear"}, 'must be "nearest" or "max", got \'linear\''),
    ],
)
def test_unknown_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours_of("3d", 2, **options)


@pytest.mark.parametrize("prior", [-1, 4, 5])
def test_a_prior_that_leaves_no_image_is_refused(prior: int) -> None:
    with pytest.raises(ValueError, match=f"got {prior} of 4"):
        PostConcatUNet(4, 3, prior_channels=prior, **arguments("3d"))


@pytest.mark.parametrize("case", PATCHES)
@pytest.mark.parametrize("fusion", ["post", "pre"])
def test_weights_of_the_host_make_it_the_host_whatever_the_prior(case: str, fusion: str) -> None:
    network, host = ours_of(case, 2, fusion=fusion).eval(), host_of(case).eval()
    network.load_state_dict(network.weights_from_host(host.state_dict()), strict=True)
    x = batch(case, 2)
    torch.testing.assert_close(network(x), host(x[:, :CHANNELS]), rtol=1e-4, atol=1e-4)
