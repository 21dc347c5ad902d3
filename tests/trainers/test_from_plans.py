"""Networks from plans of others."""

from __future__ import annotations

from typing import Any

import pytest
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_ext.architectures.reversible_unet import ReversibleUNet
from nnunet_ext.trainers.from_plans import build_from_plans
from tests.settings import tiny


def configuration(network: type, **changes: Any) -> ConfigurationManager:
    """A 2D configuration as nnU-Net's planners write it."""
    planned = tiny((8, 8)).configuration_manager.configuration  # two stages
    architecture = planned["architecture"]
    architecture["network_class_name"] = f"{network.__module__}.{network.__name__}"
    del architecture["arch_kwargs"]["n_conv_per_stage"]
    architecture["arch_kwargs"].update(changes)
    return ConfigurationManager(planned)


@pytest.mark.parametrize(
    ("network", "depth"),
    [
        (PlainConvUNet, {"n_conv_per_stage": [2, 3]}),
        (ResidualEncoderUNet, {"n_blocks_per_stage": [2, 3]}),
        (ReversibleUNet, {"n_conv_per_stage": [9, 9], "blocks_per_stage": [2, 3]}),
    ],
)
def test_depth_and_options_come_from_the_plans(network: type, depth: dict[str, Any]) -> None:
    built = build_from_plans(ReversibleUNet, configuration(network, **depth), 1, 2, True)
    assert isinstance(built, ReversibleUNet)
    assert [len(stage.couplings) for stage in built.encoder.stages] == [2, 3]
    assert built.decoder.deep_supervision


def test_plans_of_another_kind_of_network_are_refused() -> None:
    plans = configuration(ReversibleUNet, n_conv_per_stage=[1, 1], embed_dim=96)
    with pytest.raises(ValueError, match=r"plans are for .*ReversibleUNet and hold embed_dim: use plans of nnU-Net"):
        build_from_plans(ReversibleUNet, plans, 1, 2, True)
