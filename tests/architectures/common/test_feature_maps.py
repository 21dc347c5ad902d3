"""Feature maps that nnU-Net's own planners ask for, against nnU-Net's own count."""

from __future__ import annotations

import pytest
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

from nnunet_ext.architectures.common.feature_maps import CountedFeatureMaps
from tests.contract.plans import PATCHES, arguments


class CountedPlain(CountedFeatureMaps, PlainConvUNet):  # type: ignore[misc]
    input_channels = 2


class CountedResidual(CountedFeatureMaps, ResidualEncoderUNet):  # type: ignore[misc]
    input_channels = 2


@pytest.mark.parametrize("case", PATCHES)
def test_convolutions_are_counted_as_nnunet_counts_them(case: str) -> None:
    counted, host = (CountedResidual, ResidualEncoderUNet) if case == "resenc" else (CountedPlain, PlainConvUNet)
    ours, theirs = (kind(2, num_classes=3, **arguments(case), deep_supervision=False) for kind in (counted, host))
    ours.train()
    found = ours.compute_conv_feature_map_size(PATCHES[case])
    assert found == theirs.compute_conv_feature_map_size(PATCHES[case])
    assert ours.training
