"""nnU-Net's own U-Nets from the arguments of default or ResEnc plans."""

from __future__ import annotations

from typing import Any

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
from dynamic_network_architectures.initialization.weight_init import (
    InitWeights_He,
    init_last_bn_before_add_to_0,
)
from torch import nn

from nnunet_ext.architectures.common.plan_sizes import (
    check_depths,
    check_first_stride,
    check_norm,
    check_odd,
    check_stages,
    check_whole,
    per_stage_and_axis,
    per_stage_list,
)


def host_unet(
    n_conv_per_stage: Any, n_blocks_per_stage: Any, **arguments: Any
) -> PlainConvUNet | ResidualEncoderUNet:
    """Build the network that the plans describe.

    Args:
        n_conv_per_stage: Convolutions per encoder stage, from default plans.
        n_blocks_per_stage: Residual blocks per encoder stage, from ResEnc plans; one of both is given.
        arguments: Arguments of nnU-Net's networks.

    Raises:
        ValueError: both or neither of n_conv_per_stage and n_blocks_per_stage, lists that do not fit n_stages, fewer
            than two stages, even kernels, a depth below 1.
    """
    if (n_conv_per_stage is None) == (n_blocks_per_stage is None):
        raise ValueError(
            "A U-Net needs either n_conv_per_stage (default plans) or n_blocks_per_stage (ResEnc plans), got "
            f"{n_conv_per_stage} and {n_blocks_per_stage}: use plans of nnU-Net's planners."
        )
    _check(n_blocks_per_stage if n_conv_per_stage is None else n_conv_per_stage, arguments)
    if arguments["dropout_op_kwargs"] is None:  # which nnU-Net's blocks take of norms and nonlinearities only
        arguments["dropout_op_kwargs"] = {}
    if n_blocks_per_stage is None:
        return PlainConvUNet(n_conv_per_stage=n_conv_per_stage, **arguments)
    return ResidualEncoderUNet(n_blocks_per_stage=n_blocks_per_stage, **arguments)


def _check(depths: Any, arguments: dict[str, Any]) -> None:
    """Say in a sentence what nnU-Net's networks would say by a traceback, or only in training."""
    n, conv_op = arguments["n_stages"], arguments["conv_op"]
    check_stages("U-Net", n)
    check_norm(arguments["norm_op"])
    check_whole(
        "features_per_stage", per_stage_list("features_per_stage", arguments["features_per_stage"], n)
    )
    check_odd(per_stage_and_axis("kernel_sizes", conv_op, arguments["kernel_sizes"], n))
    check_first_stride(per_stage_and_axis("strides", conv_op, arguments["strides"], n))
    check_depths(
        per_stage_list("blocks per encoder stage", depths, n),
        per_stage_list("n_conv_per_stage_decoder", arguments["n_conv_per_stage_decoder"], n - 1),
    )


def initialize_as_host(module: nn.Module) -> None:
    """Initialise a module as nnU-Net's networks do (He et al. 2015); meant for `Module.apply`."""
    InitWeights_He(1e-2)(module)
    if isinstance(module, (BasicBlockD, BottleneckD)):  # residual blocks start as identity
        last = module.conv3 if isinstance(module, BottleneckD) else module.conv2
        if getattr(getattr(last, "norm", None), "weight", None) is not None:
            init_last_bn_before_add_to_0(module)
