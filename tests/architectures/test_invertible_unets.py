"""Partially and fully invertible U-Net: inversion, gradients, memory, VAE branch."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn
from torch.distributions import Normal, kl_divergence

from nnunet_ext.architectures.invertible_unet import InvertibleUNet, fitting_features
from nnunet_ext.architectures.partially_invertible_unet import PartiallyInvertibleUNet
from nnunet_ext.architectures.reversible.stages import GROUP_ELEMENTS
from nnunet_ext.architectures.reversible.vae_branch import Reconstruction
from nnunet_ext.memory.network import StepMemory, deployed, measure_size, measure_step, surrogate_loss
from tests.architectures.test_reversible_unet import ANISOTROPIC, DEFAULT, arguments

NETWORKS = [InvertibleUNet, PartiallyInvertibleUNet]
CASES: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (3, {}),
    (3, ANISOTROPIC),
    (3, {"norm_op": nn.BatchNorm3d}),
    (3, {"norm_op": None, "norm_op_kwargs": None}),
    (3, {"blocks_per_stage": [1, 2, 3]}),
    (3, {"preactivation": False, "nonlin": nn.GELU, "nonlin_kwargs": {}}),
    (3, {"deep_supervision": False}),
    (3, {"vae": True}),
    (2, {"vae": True, "image_channels": 1}),
]


def pair(
    network_class: type[nn.Module], dim: int, changes: dict[str, Any]
) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A network, its twin in plain autograd, and an image of 3 channels."""
    torch.manual_seed(0)
    values = arguments([8, 16, 24], dim, **changes)
    ours = network_class(3, 4, **values).double().train()
    if ours.vae is not None:  # away from the zeros that the latent starts with
        for conv in (ours.vae.mean, ours.vae.log_variance):
            nn.init.normal_(conv.weight, std=0.1)
    plain = network_class(3, 4, reversible=False, **values).double().train()
    plain.load_state_dict(ours.state_dict())
    return ours, plain, torch.randn(2, 3, *[8] * dim, dtype=torch.float64)


def gradients(network: nn.Module, x: torch.Tensor, autocast: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(1)
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = surrogate_loss(network(x))
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize(("dim", "changes"), CASES)
def test_gradients_are_those_of_plain_autograd(
    network_class: type[nn.Module], dim: int, changes: dict[str, Any]
) -> None:
    ours, plain, x = pair(network_class, dim, changes)
    x.requires_grad_()
    for found, expected in zip(gradients(ours, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    for found, expected in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)  # running statistics are counted once


@pytest.mark.parametrize("resampling", ["orthogonal", "squeeze"])
@pytest.mark.parametrize(("dim", "changes"), [CASES[i] for i in (0, 1, 2, 5)])
def test_whole_chain_inverts(resampling: str, dim: int, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = InvertibleUNet(1, 2, resampling=resampling, **arguments([8, 16, 24], dim, **changes)).double()
    x = torch.randn(2, 8, *[8] * dim, dtype=torch.float64)
    with torch.no_grad():
        chain = replace(network.chain(), enter=None, gives_last=True)
        y, *logits = chain(x)
        assert y.shape == x.shape
        assert (y - x).abs().max() > 0.1
        assert (chain.inverse(y) - x).abs().max() <= 1e-10
    assert len(logits) == 2
    assert logits[-1].shape == (2, 2, *[8] * dim)


def test_exact_chain_inverts_bit_for_bit_and_so_do_its_gradients() -> None:
    values = arguments([8, 16, 24], resampling="squeeze", exact=True, blocks_per_stage=8)
    torch.manual_seed(0)
    ours, plain = InvertibleUNet(1, 2, **values), InvertibleUNet(1, 2, reversible=False, **values)
    plain.load_state_dict(ours.state_dict())
    x = torch.round(torch.randn(1, 8, 8, 8, 8) * 4096) / 4096
    chain = replace(ours.chain(), enter=None, gives_last=True)
    with torch.no_grad():
        assert torch.equal(chain.inverse(chain(x)[0]), x)
    image = torch.randn(1, 1, 8, 8, 8)
    for autocast in (False, True):
        pair_of = (gradients(network, image, autocast) for network in (ours, plain))
        for found, expected in zip(*pair_of, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_exact_mode_is_refused_with_mixing() -> None:
    with pytest.raises(ValueError, match='exact=True needs resampling="squeeze", got "orthogonal"'):
        InvertibleUNet(1, 2, exact=True, **arguments([8, 16]))
    with pytest.raises(ValueError, match="resampling must be"):
        InvertibleUNet(1, 2, resampling="pool", **arguments([8, 16]))


def test_unused_last_feature_map_and_unused_tap_have_gradients() -> None:
    ours, plain, x = pair(InvertibleUNet, 3, {})
    for chosen in (0, 1):
        found, expected = ([], [])
        for network, into in ((ours, found), (plain, expected)):
            network.zero_grad()
            network(x)[chosen].square().mean().backward()
            into += [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_samples_in_groups_have_the_same_gradients() -> None:
    for network_class in NETWORKS:
        ours, plain, x = pair(network_class, 3, {})
        ours.group_elements = 1
        for found, expected in zip(gradients(ours, x), gradients(plain, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("features", "strides", "expected"),
    [
        ([32, 64, 128, 256, 320, 320], [[1] * 3] + [[2] * 3] * 5, [32, 64, 128, 256, 320, 320]),
        ([32, 64, 128], [[1, 1], [2, 2], [2, 2]], [32, 64, 128]),
        ([32, 64, 128], [[1, 1, 1], [1, 2, 2], [2, 2, 2]], [32, 64, 128]),
        ([32, 60, 130], [[1, 1, 1], [2, 2, 2], [2, 2, 2]], [32, 64, 128]),  # 60 lies between 56 and 64
        ([31, 64], [[1, 1, 1], [2, 2, 2]], [30, 64]),
        ([32, 64], [[1, 1, 1], [1, 1, 2]], [32, 62]),  # 64 would need all 32 channels of the stage above
        ([32, 64], [[1, 1, 1], [1, 1, 1]], [32, 30]),
        ([32, 64], [[1, 1, 1], [3, 1, 1]], [32, 66]),
    ],
)
def test_features_are_rounded_to_the_nearest_that_fit(
    features: list[int], strides: list[list[int]], expected: list[int]
) -> None:
    found = fitting_features(features, strides)
    assert found == expected
    for above, here, stride in zip(found, found[1:], strides[1:], strict=False):
        down = here / torch.tensor(stride).prod().item()
        assert down == int(down) < above
        assert here % 2 == 0


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"strides": [[1] * 3, [10**6] * 3, [2] * 3]}, r"at most 1e\+10 weights, got features \[9, 17, 23\]"),
        ({"strides": [[1] * 3, [100] * 3, [2] * 3]}, r"at most 1e\+10 weights"),
        ({"vae": True, "image_channels": 5}, "image_channels are the first"),
    ],
)
def test_nothing_is_logged_of_a_network_that_is_refused(
    changes: dict[str, Any], refused: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nnunet_ext"), pytest.raises(ValueError, match=refused):
        InvertibleUNet(1, 2, **arguments([9, 17, 23], 3, **changes))
    assert not caplog.text


def test_rounding_is_logged_and_the_network_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nnunet_ext"):
        network = InvertibleUNet(1, 2, **arguments([7, 13, 21]))
    assert "rounds features_per_stage [7, 13, 21] to [6, 16, 24]" in caplog.text
    assert network.train()(torch.randn(1, 1, 8, 8, 8))[0].shape == (1, 2, 8, 8, 8)


def test_too_narrow_stage_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Stage 1 of an InvertibleUNet needs 62 features .* at most 1 channels"):
        fitting_features([2, 64], [[1, 1], [1, 31]])


@pytest.mark.parametrize("network_class", NETWORKS)
def test_patch_that_the_strides_do_not_divide_is_refused(network_class: type[nn.Module]) -> None:
    network = network_class(1, 2, **arguments([8, 16, 24], **ANISOTROPIC))
    with pytest.raises(ValueError, match=r"divisible by \[2, 4, 4\], the product of the strides, got \[8, 8, 6\]"):
        network(torch.zeros(1, 1, 8, 8, 6))


def test_odd_features_of_the_partially_invertible_network_are_refused() -> None:
    with pytest.raises(ValueError, match="stage 1 has 7 features; use 6 or 8"):
        PartiallyInvertibleUNet(1, 2, **arguments([8, 7, 24]))


@pytest.mark.parametrize("network_class", NETWORKS)
def test_vae_branch_works_in_training_only(network_class: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = network_class(3, 2, vae=True, image_channels=2, **arguments([8, 16, 24]))
    x = torch.randn(2, 3, 8, 8, 8)
    outputs, reconstruction = network.train()(x)
    assert [tuple(o.shape) for o in outputs] == [(2, 2, 8, 8, 8), (2, 2, 4, 4, 4)]
    assert isinstance(reconstruction, Reconstruction)
    torch.testing.assert_close(reconstruction.target, x[:, :2])
    assert reconstruction.image.shape == (2, 2, 8, 8, 8)

    ran: list[nn.Module] = []
    network.vae.register_forward_hook(lambda module, *_: ran.append(module))
    evaluated = network.eval()(x)
    assert ran == []
    assert [tuple(o.shape) for o in evaluated] == [(2, 2, 8, 8, 8), (2, 2, 4, 4, 4)]


def record_of(mean: torch.Tensor, log_variance: torch.Tensor) -> Reconstruction:
    """A record of 16^3 voxels, two samples of three channels, an error of 1 everywhere."""
    image = torch.ones(2, 3, 16, 16, 16)
    return Reconstruction(image, torch.zeros_like(image), mean, log_variance)


def test_kl_is_that_of_the_paper_the_sum_over_the_latent_by_the_voxels_of_the_image() -> None:
    torch.manual_seed(0)
    mean, log_variance = torch.randn(2, 2, 5, 2, 2, 2)
    l2, kl = record_of(mean, log_variance).losses()
    prior, latent = Normal(0.0, 1.0), Normal(mean, log_variance.exp().sqrt())
    per_sample = 2 * kl_divergence(latent, prior).flatten(1).sum(1) / 16**3  # the paper leaves out the half
    torch.testing.assert_close(kl, per_sample.mean())
    assert l2.item() == 1.0
    assert record_of(torch.zeros(2, 5, 2, 2, 2), torch.zeros(2, 5, 2, 2, 2)).losses()[1].item() == 0.0


def test_gradient_of_kl_per_voxel_is_that_per_latent_by_the_voxels_of_a_latent() -> None:
    torch.manual_seed(0)
    latent = torch.randn(2, 2, 5, 2, 2, 2, requires_grad=True)
    per_voxel, per_latent = (
        torch.autograd.grad(record_of(*latent).losses(kl_per)[1], latent)[0] for kl_per in ("voxel", "latent")
    )
    torch.testing.assert_close(per_voxel * (16**3 / (5 * 2**3)), per_latent)


def test_latent_is_sampled_in_training_and_its_mean_in_evaluation() -> None:
    network = InvertibleUNet(1, 2, vae=True, **arguments([8, 16, 24]))
    features, x = torch.randn(1, 24, 2, 2, 2), torch.randn(1, 1, 8, 8, 8)
    first, second = (network.vae.train()(features, x).image for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (network.vae.eval()(features, x).image for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("network_class", NETWORKS)
def test_weights_with_a_vae_branch_load_without_it_and_not_the_other_way(network_class: type[nn.Module]) -> None:
    values = arguments([8, 16, 24])
    with_vae, without = network_class(1, 2, vae=True, **values), network_class(1, 2, **values)
    without.load_state_dict(with_vae.state_dict(), strict=True)
    x = torch.randn(1, 1, 8, 8, 8)
    torch.testing.assert_close(without.eval()(x)[0], with_vae.eval()(x)[0], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="needs the weights of its VAE branch, these have none: load them into"):
        with_vae.load_state_dict(without.state_dict())


@pytest.mark.parametrize("network_class", NETWORKS)
def test_deployed_form_is_counted_without_the_branch(network_class: type[nn.Module]) -> None:
    values = arguments([8, 16, 24])
    with_vae = measure_size(deployed(lambda: network_class(1, 2, vae=True, **values)), 1, (8, 8, 8))
    assert with_vae == measure_size(lambda: network_class(1, 2, **values), 1, (8, 8, 8))


def memory(network_class: type[nn.Module], patch: tuple[int, ...] = (128,) * 3, **changes: Any) -> StepMemory:
    dtype = changes.pop("dtype", None)
    features = DEFAULT if len(patch) == 3 else [32, 64, 128, 256, 512, 512, 512]
    batch = 2 if len(patch) == 3 else 12
    values = arguments(features, len(patch), **changes)
    return measure_step(lambda: network_class(input_channels=1, num_classes=3, **values), 1, patch, batch, dtype)


@pytest.fixture(scope="module")
def default_memory() -> StepMemory:
    return memory(PlainConvUNet)


@pytest.mark.parametrize("blocks", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("network_class", "held", "peak"), [(InvertibleUNet, 0.12, 0.33), (PartiallyInvertibleUNet, 0.22, 0.5)]
)
def test_memory_at_full_size_is_a_fraction_of_default_nnunet(
    network_class: type[nn.Module], held: float, peak: float, blocks: int, default_memory: StepMemory
) -> None:
    ours = memory(network_class, blocks_per_stage=blocks)
    assert ours.held <= held * default_memory.held
    assert ours.peak <= peak * default_memory.peak


@pytest.mark.parametrize(
    "network_class", [PartiallyInvertibleUNet, pytest.param(InvertibleUNet, marks=pytest.mark.slow)]
)
def test_vae_branch_costs_little_memory(network_class: type[nn.Module]) -> None:
    without, with_vae = memory(network_class), memory(network_class, vae=True)
    assert with_vae.held <= 1.15 * without.held
    assert with_vae.peak <= 1.15 * without.peak


def test_batch_norm_is_not_run_in_groups() -> None:
    assert InvertibleUNet(1, 2, **arguments([8, 16], norm_op=nn.BatchNorm3d)).group_elements is None
    assert InvertibleUNet(1, 2, **arguments([8, 16])).group_elements == GROUP_ELEMENTS
