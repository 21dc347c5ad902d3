"""Partially reversible U-Net: reversible stages, joined by transitions that keep nothing of their own.

Bruegger, Baumgartner, Konukoglu 2019, "A Partially Reversible U-Net for Memory-Efficient Volumetric Image
Segmentation", https://arxiv.org/abs/1906.06148. Different from the paper: sizes, strides, kernels, norm and depth
come from nnU-Net's plans; a bare strided convolution leads down (paper: pooling, then 1x1x1 convolution; max pooling
would keep indices) and a bare transposed convolution up (paper: 1x1x1 convolution, then trilinear upsampling). As in
the paper, skips are added, not concatenated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dynamic_network_architectures.building_blocks.helper import get_matching_convtransp
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nnunet_ext.architectures.common.feature_maps import CountedFeatureMaps
from nnunet_ext.architectures.common.norm_statistics import NormStatistics
from nnunet_ext.architectures.common.plan_sizes import check_patch_size, patch_divisors
from nnunet_ext.architectures.common.plan_values import options_checked
from nnunet_ext.architectures.reversible.decoder import StagedDecoder
from nnunet_ext.architectures.reversible.network import ChainNetwork
from nnunet_ext.architectures.reversible.recomputation import uncompiled
from nnunet_ext.architectures.reversible.stages import CouplingSpec, ReversiblePlan, StageSpec, group_elements
from nnunet_ext.architectures.reversible.transitions import Down, Up


class Encoder(nn.Module):
    """Stages from the finest to the coarsest: a bare (strided) convolution, then couplings.

    Shape: (B, C_in, *patch) -> (B, C_s, *patch / cumulative stride) in every stage.
    """

    def __init__(
        self, input_channels: int, plan: ReversiblePlan, stages: Sequence[StageSpec], coupling: CouplingSpec
    ) -> None:
        super().__init__()
        channels = [input_channels, *(stage.channels for stage in stages)]
        self.transitions = nn.ModuleList(
            plan.conv(below, stage.channels, stage.kernel_size, stage.stride)
            for below, stage in zip(channels, stages, strict=False)
        )
        self.stages = nn.ModuleList(coupling.sequence(plan, stage, stage.encoder_blocks) for stage in stages)

    def check_patch(self, x: Tensor, norms: NormStatistics) -> None:
        """Refuse an image that the strides do not divide, or whose coarsest feature map is too small.

        Args:
            x: Batch of images.
            norms: What the network's norms need of that map.

        Raises:
            ValueError: names the divisor of each axis, or patch and batch.
        """
        strides = [transition.stride for transition in self.transitions if isinstance(transition, _ConvNd)]
        check_patch_size(x, patch_divisors(strides), norms, self.training)

    @property
    def enter(self) -> nn.Module | None:
        """The first convolution; None where it has run before, as in meU-net's expanded pass."""
        first = self.transitions[0]
        return None if isinstance(first, nn.Identity) else first

    def steps(self) -> Iterator[Any]:
        """Steps of the chain from the first feature map to the coarsest."""
        levels: Any = zip(self.transitions, self.stages, strict=True)
        for i, (transition, stage) in enumerate(levels):
            if i:
                yield Down(transition)
            yield from stage.couplings.children()


class Decoder(StagedDecoder):
    """Stages from the coarsest to the finest: a transposed convolution, the skip added, couplings, a head.

    Shape: (B, num_classes, *patch / scale) in every stage.
    """

    joins = Up

    def transition(self, plan: ReversiblePlan, coarse: StageSpec, fine: StageSpec) -> nn.Module:
        """Build a transposed convolution."""
        transposed = get_matching_convtransp(conv_op=plan.conv_op)
        return transposed(coarse.channels, fine.channels, coarse.stride, coarse.stride, bias=plan.conv_bias)


class ReversibleUNet(ChainNetwork, CountedFeatureMaps):
    """Partially reversible U-Net (Bruegger et al. 2019): training memory independent of the blocks per stage.

    Training keeps one feature map per stage of the decoder, in autocast's dtype; skips are found again. Built from
    nnU-Net's plans, default or ResEnc; arguments that are not listed mean what they mean there.

    Args:
        input_channels: Channels of the image.
        num_classes: Channels of the logits.
        deep_supervision: Return a list of logits, largest first.
        blocks_per_stage: Overrides the depth of the plans: one number for all stages of encoder and decoder, or
            one per resolution, finest first, for both. None: from the plans.
        reversible: False keeps all activations: same weights and outputs, plain autograd, the reference of tests.
        exact: Bit-exact inversion, see `nnunet_ext.architectures.reversible.sequence`.
        preactivation: Norm, nonlinearity, convolution within a block (True), or nnU-Net's convolution, norm,
            nonlinearity (False). docs/methods/reversible.md holds the comparison.

    Shape: (B, input_channels, *patch) -> (B, num_classes, *patch), or a list of (B, num_classes, *patch / scale);
        patch divisible by the cumulative strides.

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
        **plan_arguments: Any,
    ) -> None:
        super().__init__()
        plan = ReversiblePlan.of(plan_arguments)
        self.stages = plan.stages(blocks_per_stage)
        self.input_channels = input_channels
        self.reversible, self.exact = reversible, exact
        self.group_elements = group_elements(plan)
        coupling = CouplingSpec(reversible=reversible, exact=exact, preactivation=preactivation)
        self.exact_range = coupling.exact_range
        self.encoder = Encoder(input_channels, plan, self.stages, coupling)
        self.decoder = Decoder(num_classes, plan, self.stages, coupling, deep_supervision)
        self.norm_statistics = NormStatistics.of(self)

    @uncompiled
    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits; in training with deep supervision a list, largest first."""
        self.encoder.check_patch(x, self.norm_statistics)
        logits = list(self.chain()(x))[::-1]
        return logits if self.decoder.deep_supervision else logits[0]

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initialise a module as nnU-Net's own networks do (He et al. 2015); meant for `Module.apply`."""
        InitWeights_He(1e-2)(module)
