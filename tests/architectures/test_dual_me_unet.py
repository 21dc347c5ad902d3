"""The ensemble of the dual meU-net: what its logits mean, and that its parts are nnU-Net's own networks."""

from __future__ import annotations

import copy
from math import log
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from torch import Tensor

from nnunet_ext.architectures.me_unet import DualMeUNet, mean_of_sigmoids, mean_of_softmaxes
from tests.contract.plans import PATCHES, arguments


def build(case: str = "3d", **options: bool) -> DualMeUNet:
    torch.manual_seed(0)
    network = DualMeUNet(2, 3, **arguments(case), **options)
    network.apply(network.initialize)
    return network.double()


def image(case: str = "3d") -> Tensor:
    return torch.randn(2, 2, *PATCHES[case], dtype=torch.float64)


@pytest.mark.parametrize("case", PATCHES)
def test_softmax_of_the_logits_is_the_mean_of_the_branches_softmaxes(case: str) -> None:
    network, x = build(case).eval(), image(case)
    expected = sum(branch(x).softmax(1) for branch in network.branches) / 2
    torch.testing.assert_close(network(x).softmax(1), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network(x).exp(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", PATCHES)
def test_sigmoid_of_the_logits_of_regions_is_the_mean_of_the_branches_sigmoids(case: str) -> None:
    network, x = build(case, regions=True).eval(), image(case)
    expected = sum(branch(x).sigmoid() for branch in network.branches) / 2
    torch.testing.assert_close(network(x).sigmoid(), expected, rtol=1e-5, atol=1e-6)


def test_extreme_logits_stay_finite_and_right() -> None:
    sure, opposite = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    torch.testing.assert_close(mean_of_softmaxes([sure, opposite]), torch.full((1, 2), -log(2)))
    torch.testing.assert_close(mean_of_sigmoids([sure, -sure])[:, :1], torch.zeros(1, 1))
    for agreed in (mean_of_sigmoids([sure, sure]), mean_of_softmaxes([sure, sure])):
        assert agreed.isfinite().all()
    torch.testing.assert_close(mean_of_sigmoids([sure, sure]), sure)
    half = torch.randn(1, 3, 4).half()
    assert mean_of_softmaxes([half, half]).dtype == torch.float16


def test_mean_of_equal_branches_is_what_one_says() -> None:
    z = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(mean_of_softmaxes([z, z]), z.log_softmax(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean_of_sigmoids([z, z]), z, rtol=1e-5, atol=1e-6)


def test_a_list_of_levels_is_averaged_level_by_level() -> None:
    network, x = build(), image()
    network.decoder.deep_supervision = True
    outputs = network(x)
    parts = [branch(x) for branch in network.branches]
    assert all(isinstance(part, list) for part in parts)
    for level, output in enumerate(outputs):
        expected = sum(part[level].softmax(1) for part in parts) / 2
        torch.testing.assert_close(output.softmax(1), expected, rtol=1e-5, atol=1e-6)
    assert network.decoder.deep_supervision
    network.decoder.deep_supervision = False
    assert isinstance(network(x), Tensor)


@pytest.mark.parametrize(("case", "host"), [("3d", PlainConvUNet), ("resenc", ResidualEncoderUNet)])
def test_branches_are_nnunets_own_networks_with_weights_of_their_own(case: str, host: type) -> None:
    network = build(case)
    assert [type(branch) for branch in network.branches] == [host, host]
    theirs = host(input_channels=2, num_classes=3, deep_supervision=True, **arguments(case)).double()
    theirs.load_state_dict(network.branches[0].state_dict(), strict=True)
    first, second = (next(branch.parameters()) for branch in network.branches)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("regions", [False, True])
def test_a_checkpoint_tells_a_network_built_from_plans_of_its_regions(regions: bool) -> None:
    trained, built = build(regions=regions), build(regions=not regions)
    built.load_state_dict(copy.deepcopy(trained.state_dict()), strict=True)
    assert built.regions is regions
    x = image()
    torch.testing.assert_close(built(x), trained(x), rtol=0, atol=0)


def test_a_checkpoint_whose_regions_stand_beside_the_branches_still_loads() -> None:
    trained, built = build(regions=True), build()
    weights = {key: value for key, value in trained.state_dict().items() if "_extra_state" not in key}
    built.load_state_dict({"_extra_state": torch.tensor(True), **weights}, strict=True)
    assert built.regions


def test_pretrained_weights_of_the_host_are_refused_by_a_weight_that_they_miss(tmp_path: Path) -> None:
    host = PlainConvUNet(input_channels=2, num_classes=3, **arguments("3d"))
    torch.save({"network_weights": host.state_dict()}, tmp_path / "default.pth")
    with pytest.raises(AssertionError, match=r"Key branches\.0\.encoder\.\S+weight is missing"):
        load_pretrained_weights(build(), str(tmp_path / "default.pth"))


def test_pretrained_weights_leave_regions_as_they_are(tmp_path: Path) -> None:
    torch.save({"network_weights": build(regions=True).state_dict()}, tmp_path / "regions.pth")
    network = build()
    load_pretrained_weights(network, str(tmp_path / "regions.pth"))
    assert not network.regions


def test_what_is_planned_for_is_one_branch_because_they_train_in_turn() -> None:
    network = build()
    patch = PATCHES["3d"]
    expected = network.branches[1].compute_conv_feature_map_size(patch)
    assert network.compute_conv_feature_map_size(patch) == expected


def test_plans_of_neither_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"either n_conv_per_stage .* got None and None"):
        DualMeUNet(2, 3, **{**arguments("3d"), "n_conv_per_stage": None})


@pytest.mark.parametrize("case", PATCHES)
def test_weights_of_the_host_make_both_branches_say_what_it_says(case: str) -> None:
    network, x = build(case).eval(), image(case)
    host_class = ResidualEncoderUNet if case == "resenc" else PlainConvUNet
    host = host_class(input_channels=2, num_classes=3, **arguments(case)).double().eval()
    network.load_state_dict(network.weights_from_host(host.state_dict()), strict=True)
    torch.testing.assert_close(network(x), host(x).log_softmax(1), rtol=1e-5, atol=1e-6)
