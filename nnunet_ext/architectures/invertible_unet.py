"""Fully invertible U-Net: from the first feature map to the last one bijection, skips included.

Yamazaki, Rathour, Le 2021, "Invertible Residual Network with Regularization for Effective Volumetric Segmentation",
https://arxiv.org/abs/2103.09042 (Fully-InvRes). Different from the paper: sizes, strides, kernels, norm and depth come
from nnU-Net's plans, and downsampling leaves part of the channels behind as the skip, so that skips belong to the
bijection and nothing of a level is kept once the next has consumed it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from math import lcm, prod
from typing import Any, Literal

from torch import nn

from nnunet_ext.architectures.common.feature_maps import CountedFeatureMaps
from nnunet_ext.architectures.common.norm_statistics import NormStatistics
from nnunet_ext.architectures.common.plan_values import options_checked
from nnunet_ext.architectures.reversible.coupling import ExactRange
from nnunet_ext.architectures.reversible.levels import Ascend, Descend, Squeeze
from nnunet_ext.architectures.reversible.stages import CouplingSpec, ReversiblePlan, StageSpec, group_elements
from nnunet_ext.architectures.reversible.transitions import Head
from nnunet_ext.architectures.reversible.vae_branch import VAEBranch, VAENetwork, reconstructed_channels

_logger = logging.getLogger("nnunet_ext")


def fitting_features(features: Sequence[int], strides: Sequence[Sequence[int]]) -> list[int]:
    """Features per stage that an invertible chain can have, as near to `features` as possible.

    Channels are even; C_l of a lower stage is ``d * prod(stride)`` for the d channels that come down to it, and at
    least one channel stays above as the skip.

    Raises:
        ValueError: a stage is too narrow to feed the one below.
    """
    fitting = [max(2, features[0] - features[0] % 2)]
    for i, (asked, stride) in enumerate(zip(features[1:], strides[1:], strict=True), start=1):
        step = lcm(2, prod(stride))
        most = (fitting[-1] - 1) * prod(stride)
        most -= most % step
        if most < step:
            raise ValueError(
                f"Stage {i} of an InvertibleUNet needs {step} features or a multiple, made of at most "
                f"{fitting[-1] - 1} channels of the stage above, got {fitting[-1]} there: use more in stage {i - 1}."
            )
        fitting.append(min(most, max(step, (2 * asked + step) // (2 * step) * step)))
    return fitting


class Encoder(nn.Module):
    """A convolution from the image to the first feature map, then couplings and descents."""

    def __init__(
        self,
        input_channels: int,
        plan: ReversiblePlan,
        stages: Sequence[StageSpec],
        coupling: CouplingSpec,
        mixing: bool,
    ) -> None:
        super().__init__()
        first = stages[0]
        self.stem = plan.conv(input_channels, first.channels, first.kernel_size, first.stride)
        self.stages = nn.ModuleList(
            nn.ModuleList(coupling.couplings(plan, stage, stage.encoder_blocks)) for stage in stages
        )
        self.descents = nn.ModuleList(
            Descend(Squeeze(stage.channels // prod(stage.stride), stage.stride, mixing)) for stage in stages[1:]
        )

    @property
    def enter(self) -> nn.Module:
        """What leads to the first feature map."""
        return self.stem

    def steps(self) -> Iterator[Any]:
        """Steps of the chain from the first feature map to the bottleneck."""
        first, *lower = self.stages
        yield from first.children()
        for descent, stage in zip(self.descents, lower, strict=True):
            yield descent
            yield from stage.children()


class Decoder(nn.Module):
    """Ascents and couplings, and a head at every level."""

    def __init__(
        self,
        num_classes: int,
        plan: ReversiblePlan,
        stages: Sequence[StageSpec],
        coupling: CouplingSpec,
        mixing: bool,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        upwards = stages[-2::-1]
        self.ascents = nn.ModuleList(
            Ascend(Squeeze(stage.channels // prod(stage.stride), stage.stride, mixing)) for stage in stages[:0:-1]
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(coupling.couplings(plan, stage, stage.decoder_blocks)) for stage in upwards
        )
        # All heads exist with and without deep supervision, so that checkpoints fit both (as in nnU-Net).
        self.seg_layers = nn.ModuleList(
            plan.conv_op(stage.channels, num_classes, 1, 1, 0, bias=True) for stage in upwards
        )

    def steps(self) -> Iterator[Any]:
        """Steps of the chain from the bottleneck to the last feature map; heads where logits are wanted."""
        last = len(self.stages) - 1
        for i, (ascent, stage, head) in enumerate(zip(self.ascents, self.stages, self.seg_layers, strict=True)):
            yield ascent
            yield from stage.children()
            if self.deep_supervision or i == last:
                yield Head(head)


class InvertibleUNet(VAENetwork, CountedFeatureMaps):
    """Fully invertible U-Net (Yamazaki et al. 2021): training keeps one feature map, whatever the depth.

    With deep supervision also the maps that its heads read. Built from nnU-Net's plans, default or ResEnc; arguments
    that are not listed mean what they mean there. Features that do not fit are rounded (`fitting_features`) and logged.

    Args:
        input_channels: Channels of the image, and of the previous stage in a cascade.
        num_classes: Channels of the logits.
        deep_supervision: Return a list of logits, largest first.
        blocks_per_stage: Overrides the depth of the plans, as in `ReversibleUNet`.
        reversible: False keeps all activations: same weights and outputs, plain autograd, the reference of tests.
        exact: Bit-exact inversion; needs ``resampling="squeeze"``.
        preactivation: Norm, nonlinearity, convolution within a block (True), or convolution, norm, nonlinearity.
        vae: Reconstruct the image from the bottleneck in training.
        image_channels: Channels that are reconstructed, the first ones; None: all.
        resampling: "orthogonal", squeezing and a learned orthogonal mixing of channels, or "squeeze" without mixing.

    Shape: (B, input_channels, *patch) -> (B, num_classes, *patch), or a list of (B, num_classes, *patch / scale); in
        training with ``vae=True`` a pair of that and a `Reconstruction`. The strides divide the patch.

    Raises:
        ValueError: lists that do not fit n_stages, fewer than two stages, even kernels, a depth below 1, features
            that are too few, both or neither of n_conv_per_stage and n_blocks_per_stage, exact mode with mixing.
    """

    @options_checked
    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        deep_supervision: bool = False,
        blocks_per_stage: int | Sequence[int] | None = None,
        reversible: bool = True,
        exact: bool = False,
        preactivation: bool = True,
        vae: bool = False,
        image_channels: int | None = None,
        resampling: Literal["orthogonal", "squeeze"] = "orthogonal",
        **plan_arguments: Any,
    ) -> None:
        super().__init__()
        if resampling not in ("orthogonal", "squeeze"):
            raise ValueError(f'resampling must be "orthogonal" or "squeeze", got {resampling!r}.')
        if exact and resampling != "squeeze":
            raise ValueError('exact=True needs resampling="squeeze", got "orthogonal", which rounds.')
        plan = ReversiblePlan.of(plan_arguments)
        self.stages = plan.stages(blocks_per_stage, fitting_features)
        self.input_channels = input_channels
        self.image_channels = reconstructed_channels(image_channels, input_channels)
        self.reversible, self.exact = reversible, exact
        self.group_elements = group_elements(plan)
        self.exact_range = ExactRange()
        coupling = CouplingSpec(reversible=reversible, exact=exact, preactivation=preactivation)
        mixing = resampling == "orthogonal"
        self.encoder = Encoder(input_channels, plan, self.stages, coupling, mixing)
        self.decoder = Decoder(num_classes, plan, self.stages, coupling, mixing, deep_supervision)
        self.vae = VAEBranch(self.image_channels, plan, self.stages) if vae else None
        self.norm_statistics = NormStatistics.of(self)
        asked, fitting = plan.features(), [stage.channels for stage in self.stages]
        if fitting != asked:
            _log_rounding(tuple(asked), tuple(fitting))


@cache
def _log_rounding(features: tuple[int, ...], fitting: tuple[int, ...]) -> None:
    """Say it once; nnU-Net builds a network many times."""
    _logger.warning(
        "nnunet_ext: InvertibleUNet rounds features_per_stage %s to %s, which its strides divide.",
        list(features),
        list(fitting),
    )
