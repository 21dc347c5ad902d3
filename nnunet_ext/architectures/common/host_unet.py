"""nnU-Net's own U-Nets from the arguments of default or ResEnc plans."""

from __future__ import annotations

from collections.abc import Callable

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
from dynamic_network_architectures.initialization.weight_init import InitWeights_He, init_last_bn_before_add_to_0
from torch import nn

from nnunet_ext.architectures.common.plan_arguments import PlanArguments

Networks = tuple[Callable[..., PlainConvUNet], Callable[..., ResidualEncoderUNet]]
HOST_NETWORKS: Networks = (PlainConvUNet, ResidualEncoderUNet)


def host_unet(
    plan: PlanArguments,
    input_channels: int,
    num_classes: int,
    deep_supervision: bool,
    networks: Networks = HOST_NETWORKS,
) -> PlainConvUNet | ResidualEncoderUNet:
    """Build the network that the plans describe.

    Args:
        plan: Arguments of the plans.
        input_channels, num_classes: Channels of input and logits.
        deep_supervision: Return a list of logits, largest first.
        networks: What builds networks of default and of ResEnc plans.

    Raises:
        ValueError: see `PlanArguments.check`.
    """
    plan.check("U-Net")
    is_plain = plan.n_blocks_per_stage is None
    other = "n_blocks_per_stage" if is_plain else "n_conv_per_stage"
    encoder, decoder = plan.depths("U-Net")
    arguments = {key: value for key, value in vars(plan).items() if key != other} | {
        "features_per_stage": plan.features(),
        "kernel_sizes": plan.kernels(),
        "strides": plan.steps(),
        "n_conv_per_stage" if is_plain else "n_blocks_per_stage": encoder,
        "n_conv_per_stage_decoder": decoder,
    }
    network = networks[0] if is_plain else networks[1]
    return network(input_channels, num_classes=num_classes, deep_supervision=deep_supervision, **arguments)


def initialize_as_host(module: nn.Module) -> None:
    """Initialise a module as nnU-Net's networks do (He et al. 2015); meant for `Module.apply`."""
    InitWeights_He(1e-2)(module)
    if isinstance(module, (BasicBlockD, BottleneckD)):  # residual blocks start as identity
        last = module.conv3 if isinstance(module, BottleneckD) else module.conv2
        if getattr(getattr(last, "norm", None), "weight", None) is not None:
            init_last_bn_before_add_to_0(module)
