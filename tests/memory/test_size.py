"""Weights and operations, against hand-computed ones."""

from __future__ import annotations

import pytest
from torch import nn

from nnunet_ext.memory.network import Size, count_parameters, deployed, measure_size
from nnunet_ext.nnunet.setting import Setting


def test_operations_of_a_convolution_are_one_product_per_weight_and_output_voxel() -> None:
    size = measure_size(lambda: nn.Conv3d(3, 5, 3, stride=2, padding=1), 3, (8, 8, 8))
    assert size == Size(parameters=3 * 5 * 27 + 5, macs=3 * 5 * 27 * 4**3)


def test_operations_of_a_2d_chain_add_up() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    assert measure_size(build, 1, (16, 8)).macs == 16 * 8 * (9 * 4 + 4 * 2)


@pytest.mark.parametrize("name", ["nnUNetTrainer", "nnUNetTrainerReversible"])
def test_counted_weights_are_those_of_the_real_network(setting: Setting, name: str) -> None:
    build = setting.builder(name)
    assert count_parameters(build) == sum(p.numel() for p in build().parameters())
    assert measure_size(build, 1, setting.patch_size).parameters == count_parameters(build)


class Fusible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(1, 1, 1) for _ in range(3))

    def fuse(self) -> nn.Module:
        return nn.Conv2d(1, 1, 1)


def test_deployed_form_is_fused_and_in_eval_mode() -> None:
    network = deployed(Fusible)()
    assert isinstance(network, nn.Conv2d)
    assert not network.training
    assert count_parameters(Fusible) == 6
    assert count_parameters(deployed(Fusible)) == 2


def test_network_without_fuse_is_deployed_as_it_is() -> None:
    network = deployed(lambda: nn.Conv2d(1, 1, 1))()
    assert isinstance(network, nn.Conv2d)
    assert not network.training
