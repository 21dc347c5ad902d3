"""Partially invertible U-Net: a U-Net with max pooling, interpolation and concatenation, and invertible blocks.

Yamazaki, Rathour, Le 2021, "Invertible Residual Network with Regularization for Effective Volumetric Segmentation",
https://arxiv.org/abs/2103.09042 (Partially-InvRes). Different from the paper: sizes, strides, kernels, norm and depth
come from nnU-Net's plans, and the transitions between the levels are recomputed, so that neither indices of the
pooling nor concatenated feature maps are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from dynamic_network_architectures.building_blocks.helper import get_matching_pool_op
from torch import Tensor, nn

from nnunet_ext.architectures.common.feature_maps import CountedFeatureMaps
from nnunet_ext.architectures.common.norm_statistics import NormStatistics
from nnunet_ext.architectures.common.plan_values import options_checked
from nnunet_ext.architectures.reversible.decoder import StagedDecoder
from nnunet_ext.architectures.reversible.mixed_precision import lowered
from nnunet_ext.architectures.reversible.stages import CouplingSpec, ReversiblePlan, StageSpec, group_elements
from nnunet_ext.architectures.reversible.transitions import Down, Join
from nnunet_ext.architectures.reversible.vae_branch import VAEBranch, VAENetwork, reconstructed_channels

_INTERPOLATED = 8  # channels that are interpolated at a time


class Encoder(nn.Module):
    """Stages from the finest to the coarsest: max pooling (but for the first), convolution with norm, couplings.

    Shape: (B, C_in, *patch) -> (B, C_s, *patch / cumulative stride) in every stage.
    """

    def __init__(
        self, input_channels: int, plan: ReversiblePlan, stages: Sequence[StageSpec], coupling: CouplingSpec
    ) -> None:
        super().__init__()
        first, *lower = stages
        ones = [1] * len(first.stride)
        self.stem = nn.Sequential(
            *plan.conv_norm_nonlin(input_channels, first.channels, first.kernel_size, first.stride)
        )
        pool = get_matching_pool_op(conv_op=plan.conv_op, pool_type="max")
        self.transitions = nn.ModuleList(
            nn.Sequential(
                pool(stage.stride, stage.stride),
                *plan.conv_norm_nonlin(above.channels, stage.channels, stage.kernel_size, ones),
            )
            for above, stage in zip(stages, lower, strict=False)
        )
        self.stages = nn.ModuleList(coupling.sequence(plan, stage, stage.encoder_blocks) for stage in stages)

    @property
    def enter(self) -> nn.Module:
        """What leads to the first feature map."""
        return self.stem

    def steps(self) -> Iterator[Any]:
        """Steps of the chain from the first feature map to the coarsest."""
        first, *lower = cast(Any, self.stages)
        yield from first.couplings.children()
        for transition, stage in zip(self.transitions, lower, strict=True):
            yield Down(transition)
            yield from stage.couplings.children()


class Up(nn.Module):
    """Linear interpolation by the stride, concatenation with the skip, a convolution with norm and nonlinearity.

    Shape: (B, C_coarse, *spatial), (B, C_fine, *spatial * stride) -> (B, C_fine, *spatial * stride).
    """

    def __init__(self, plan: ReversiblePlan, coarse: StageSpec, fine: StageSpec) -> None:
        super().__init__()
        mode = "trilinear" if len(coarse.stride) == 3 else "bilinear"
        self.upsample = nn.Upsample(scale_factor=tuple(map(float, coarse.stride)), mode=mode)
        ones = [1] * len(fine.stride)
        joined = coarse.channels + fine.channels
        self.conv = nn.Sequential(*plan.conv_norm_nonlin(joined, fine.channels, fine.kernel_size, ones))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Join the coarser level with the skip."""
        # CUDA's autocast interpolates in float32: a few channels at a time, which the convolution lowers anyway.
        above = [lowered(self.upsample(channels)) for channels in x.split(_INTERPOLATED, dim=1)]
        joined: Tensor = self.conv(torch.cat([*above, skip], dim=1))
        return joined


class Decoder(StagedDecoder):
    """Stages from the coarsest to the finest: `Up`, couplings, a head.

    Shape: (B, num_classes, *patch / scale) in every stage.
    """

    joins = Join

    def transition(self, plan: ReversiblePlan, coarse: StageSpec, fine: StageSpec) -> nn.Module:
        """Build an `Up`."""
        return Up(plan, coarse, fine)


class PartiallyInvertibleUNet(VAENetwork, CountedFeatureMaps):
    """Partially invertible U-Net (Yamazaki et al. 2021): of each stage training keeps one feature map.

    Built from nnU-Net's plans, default or ResEnc; arguments that are not listed mean what they mean there.

    Args:
        input_channels: Channels of the image, and of the previous stage in a cascade.
        num_classes: Channels of the logits.
        deep_supervision: Return a list of logits, largest first.
        blocks_per_stage, reversible, exact, preactivation: Options of `ReversibleUNet`.
        vae: Reconstruct the image from the bottleneck in training.
        image_channels: Channels that are reconstructed, the first ones; None: all.

    Shape: (B, input_channels, *patch) -> (B, num_classes, *patch), or a list of (B, num_classes, *patch / scale); in
        training with ``vae=True`` a pair of that and a `Reconstruction`. The strides divide the patch.

    Raises:
        ValueError: odd number of features, lists that do not fit n_stages, fewer than two stages, even kernels,
            a depth below 1, both or neither of n_conv_per_stage and n_blocks_per_stage.
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
        **plan_arguments: Any,
    ) -> None:
        super().__init__()
        plan = ReversiblePlan.of(plan_arguments)
        self.stages = plan.stages(blocks_per_stage)
        self.input_channels = input_channels
        self.image_channels = reconstructed_channels(image_channels, input_channels)
        self.reversible, self.exact = reversible, exact
        self.group_elements = group_elements(plan)
        coupling = CouplingSpec(reversible=reversible, exact=exact, preactivation=preactivation)
        self.exact_range = coupling.exact_range
        self.encoder = Encoder(input_channels, plan, self.stages, coupling)
        self.decoder = Decoder(num_classes, plan, self.stages, coupling, deep_supervision)
        self.vae = VAEBranch(self.image_channels, plan, self.stages) if vae else None
        self.norm_statistics = NormStatistics.of(self)
