"""Folding for prediction in any network, and the precision that deployed networks compute in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nnunet_ext.architectures import deployed as module
from nnunet_ext.architectures.deployed import DeployedNetwork, fused
from nnunet_ext.architectures.fusion.folding import fold_batch_norms
from nnunet_ext.architectures.invertible_unet import InvertibleUNet
from nnunet_ext.architectures.reversible_unet import ReversibleUNet
from tests.contract.plans import PATCHES, arguments


def randomised(network: nn.Module) -> nn.Module:
    for norm in network.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.3, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return network.double().eval()


def batch_normed(case: str, **changes: Any) -> nn.Module:
    """nnU-Net's own network with batch norm, eps 1e-3."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d if case == "2d" else nn.BatchNorm3d
    kwargs = arguments(case) | {"norm_op": norm, "norm_op_kwargs": {"eps": 1e-3}} | changes
    host = ResidualEncoderUNet if "n_blocks_per_stage" in kwargs else PlainConvUNet
    return randomised(host(2, num_classes=3, **kwargs))


def image(case: str = "3d", dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 2, *PATCHES[case], dtype=dtype)


@pytest.mark.parametrize("case", PATCHES)
@pytest.mark.parametrize("changes", [{}, {"conv_bias": False}, {"dropout": True}])
def test_all_batch_norms_of_nnunets_networks_are_folded(case: str, changes: dict[str, Any]) -> None:
    if changes.pop("dropout", False):
        op = nn.Dropout2d if case == "2d" else nn.Dropout3d
        changes = {"dropout_op": op, "dropout_op_kwargs": {"p": 0.3}}
    network = batch_normed(case, **changes)
    result = fused(network)
    x = image(case)
    torch.testing.assert_close(result(x), network(x), rtol=1e-10, atol=1e-10)
    assert not [m for m in result.modules() if isinstance(m, _BatchNorm)]
    assert [m for m in network.modules() if isinstance(m, _BatchNorm)]


@pytest.mark.parametrize(
    "layers",
    [
        [nn.ConvTranspose3d(2, 4, 2, 2), nn.BatchNorm3d(4)],
        [nn.Conv3d(2, 4, 3, padding=1, groups=2, padding_mode="reflect"), nn.BatchNorm3d(4)],
        [nn.Conv3d(2, 4, 3, dilation=2), nn.Dropout3d(), nn.BatchNorm3d(4, affine=False)],
    ],
)
def test_any_convolution_takes_the_norm_behind_it(layers: list[nn.Module]) -> None:
    network = nn.Sequential(*layers)
    if layers[-1].affine:
        randomised(network)
    network.double().eval()
    layers[-1].running_mean.normal_()
    x, result = image(), copy.deepcopy(network)
    assert fold_batch_norms(result) == 1
    torch.testing.assert_close(result(x), network(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv3d(2, 4, 3), nn.LeakyReLU(), nn.BatchNorm3d(4)],
        [nn.BatchNorm3d(2), nn.Conv3d(2, 4, 3)],
        [nn.Conv3d(2, 4, 3), nn.InstanceNorm3d(4)],
        [nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4, track_running_stats=False)],
        [nn.ConvTranspose3d(2, 4, 2, 2, groups=2), nn.BatchNorm3d(4)],
    ],
)
def test_other_norms_stay(layers: list[nn.Module]) -> None:
    network = nn.Sequential(*layers).eval()
    assert fold_batch_norms(network) == 0
    assert list(network) == layers
    with pytest.raises(ValueError, match="Sequential has no block to fuse and no batch norm after a convolution"):
        fused(network)


def test_a_network_without_batch_norm_has_nothing_to_fuse() -> None:
    with pytest.raises(ValueError, match="ReversibleUNet has no block to fuse"):
        fused(ReversibleUNet(2, 3, **arguments("3d")))


def test_orthogonal_weights_are_stored_and_the_trained_network_keeps_its_own() -> None:
    network = InvertibleUNet(2, 3, **arguments("3d"), vae=True).double().eval()
    x = image()
    before = network(x)
    result = fused(network)
    torch.testing.assert_close(result(x), before, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(network(x), before, rtol=0, atol=0)
    assert not [name for name in result.state_dict() if "parametrizations" in name or "vae" in name]
    assert [name for name in network.state_dict() if "parametrizations" in name]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_natively_or_in_float32(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "computes_natively", lambda dtype: native)
    network = batch_normed("3d").float()
    deployed = DeployedNetwork(fused(network), dtype).eval()
    stored = deployed.state_dict()
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    x = image(dtype=torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = deployed(x)
        deployed(x)
    expected = dtype if native and dtype == torch.float16 else torch.float32
    assert found.dtype == expected
    assert (found.float() - network(x)).abs().max() <= 0.1 * network(x).abs().max()
    deployed.load_state_dict(stored, strict=True)  # the next fold of an ensemble


def test_float32_leaves_autocast_to_the_predictor() -> None:
    network = batch_normed("3d").float()
    deployed = DeployedNetwork(fused(network)).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert deployed(image(dtype=torch.float32)).dtype == torch.bfloat16
