"""Post-concatenation U-Net: a U-Net in which only the decoder sees a prior; stage 2 of meU-net's cascade.

Wang, Blackie, Miguel-Aliaga, Bai 2022, "Memory-efficient Segmentation of High-resolution Volumetric MicroCT Images"
(MIDL). Different from the paper: encoder and decoder are nnU-Net's own, plain or ResEnc, and the prior joins in 2D too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import Tensor, nn
from torch.nn import functional

from nnunet_ext.architectures.checkpointed.levels import Recomputation, Recompute
from nnunet_ext.architectures.common.host_unet import host_unet, initialize_as_host
from nnunet_ext.architectures.common.norm_statistics import NormStatistics
from nnunet_ext.architectures.common.plan_arguments import PlanArguments
from nnunet_ext.architectures.common.plan_sizes import check_patch_size, patch_divisors
from nnunet_ext.architectures.common.plan_values import options_checked
from nnunet_ext.architectures.expanded.partial_pass import downsample_labels

Resampling = Literal["nearest", "max"]


class PostConcatUNet(nn.Module):
    """Post-concatenation U-Net (Wang et al. 2022): the decoder sees a prior segmentation, the encoder only the image.

    The input is what nnU-Net's cascade gives, image and one-hot prior. Every level s of the decoder computes

        x_s = conv(cat(up(x_{s+1}), skip_s, prior_s))

    with prior_s the prior at the resolution of the level. With zero weights on the prior it is the default network.
    Arguments that are not listed mean what they mean in nnU-Net's plans.

    Args:
        input_channels: Channels of image and prior.
        num_classes: Channels of the logits.
        deep_supervision: Return a list of logits, largest first.
        prior_channels: Number of channels of the prior, the last of `input_channels`.
        fusion: "post", or "pre" for the ablation: the ordinary network, whose encoder sees image and prior.
        prior_resampling: "nearest", the voxel that nnU-Net's deep supervision takes, or "max", which keeps thin
            structures.
        recompute: "stages", "norms" or "finest": train with activation checkpointing; None: without.

    Shape: (B, input_channels, *patch) -> (B, num_classes, *patch), or a list of (B, num_classes, *patch / scale);
        patch divisible by the cumulative strides.

    Raises:
        ValueError: no channel is left for the image, an unknown option, both or neither of n_conv_per_stage and
            n_blocks_per_stage, lists that do not fit n_stages, fewer than two stages, even kernels, a depth below 1; in
            forward, an input without the prior, or another patch.
    """

    @options_checked
    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        deep_supervision: bool = False,
        prior_channels: int = 0,
        fusion: Literal["post", "pre"] = "post",
        prior_resampling: Resampling = "nearest",
        recompute: Recompute | None = None,
        **plan_arguments: Any,
    ) -> None:
        super().__init__()
        if not 0 <= prior_channels < input_channels:
            raise ValueError(
                f"prior_channels are the last of input_channels and leave at least one to the image, got "
                f"{prior_channels} of {input_channels}: give the number of foreground labels."
            )
        if fusion not in ("post", "pre"):
            raise ValueError(f'fusion must be "post" or "pre", got {fusion!r}.')
        if prior_resampling not in ("nearest", "max"):
            raise ValueError(f'prior_resampling must be "nearest" or "max", got {prior_resampling!r}.')
        plan = PlanArguments.of(plan_arguments)
        self.input_channels, self.prior_channels = input_channels, prior_channels
        self.joined_channels = prior_channels if fusion == "post" else 0  # that join in the decoder
        host = host_unet(plan, input_channels - self.joined_channels, num_classes, deep_supervision)
        self.encoder, self.decoder = host.encoder, host.decoder
        self.patch_divisors = patch_divisors(self.encoder.strides)
        if self.joined_channels:
            self.decoder = PriorDecoder(
                self.encoder,
                num_classes,
                plan.depths("U-Net")[1],
                deep_supervision,
                self.joined_channels,
                prior_resampling,
            )
        self.norm_statistics = NormStatistics.of(self)
        self.recomputation = None if recompute is None else Recomputation.of(self.encoder, recompute, None)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits; in training with deep supervision a list, largest first."""
        if x.shape[1] != self.input_channels:
            raise ValueError(
                f"This network needs {self.input_channels - self.prior_channels} channels of the image and "
                f"{self.prior_channels} of the previous stage's segmentation, got {x.shape[1]} in all: predict with "
                "the previous stage first, then give its folder (-prev_stage_predictions)."
            )
        check_patch_size(x, self.patch_divisors, self.norm_statistics, self.training)
        image, prior = x.split([self.input_channels - self.joined_channels, self.joined_channels], dim=1)
        priors = (prior,) if self.joined_channels else ()
        if self.recomputation is None or not self.recomputation.applies_to(self):
            return self.decoder(self.encoder(image), *priors)
        others = self.decoder.at_levels(prior) if priors else ()
        return self.recomputation.decode(self.decoder, self.recomputation.encode(self.encoder, image), others)

    def weights_from_host(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State_dict that computes what nnU-Net's own network does with these weights, to start a training from.

        Weights on the prior, the last inputs of a convolution, are zero.

        Args:
            weights: State_dict of a network from the same plans that sees only the image.
        """
        widened = dict(weights)
        for key, own in self.state_dict().items():
            missing = own.shape[1] - weights[key].shape[1] if own.dim() > 1 else 0
            if missing > 0:
                zeros = weights[key].new_zeros(len(weights[key]), missing, *own.shape[2:])
                widened[key] = torch.cat((weights[key], zeros), dim=1)
        return widened

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initialise a module as nnU-Net's own networks do; meant for `Module.apply`."""
        initialize_as_host(module)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that training keeps per sample, in the unit of nnU-Net's PlainConvUNet.

        Args:
            input_size: Voxels per axis.
        """
        return int(
            self.encoder.compute_conv_feature_map_size(input_size)
            + self.decoder.compute_conv_feature_map_size(input_size)
        )


class PriorDecoder(UNetDecoder):
    """nnU-Net's decoder with a prior next to the skip of every level.

    Args:
        encoder: Encoder of the image, nnU-Net's own.
        num_classes: Channels of the logits.
        n_conv_per_stage: Convolutions per stage.
        deep_supervision: Return a list of logits, largest first.
        prior_channels: Channels of the prior.
        resampling: How the prior comes to the resolution of each level.

    Shape: skips, finest first, and (B, prior_channels, *patch) -> as PostConcatUNet.
    """

    def __init__(
        self,
        encoder: Any,
        num_classes: int,
        n_conv_per_stage: int | Sequence[int],
        deep_supervision: bool,
        prior_channels: int,
        resampling: Resampling = "nearest",
    ) -> None:
        super().__init__(encoder, num_classes, n_conv_per_stage, deep_supervision)
        self.prior_channels, self.resampling = prior_channels, resampling
        # From the patch to each level that has a skip, finest first.
        self.level_strides = np.cumprod(np.array(encoder.strides), axis=0)[:-1].tolist()
        for stage, kernel_size in zip(self.stages, encoder.kernel_sizes[-2::-1], strict=True):
            old = stage.convs[0]
            stage.convs[0] = ConvDropoutNormReLU(
                encoder.conv_op,
                old.input_channels + prior_channels,
                old.output_channels,
                kernel_size,
                1,
                encoder.conv_bias,
                encoder.norm_op,
                encoder.norm_op_kwargs,
                encoder.dropout_op,
                encoder.dropout_op_kwargs,
                encoder.nonlin,
                encoder.nonlin_kwargs,
            )

    def forward(self, skips: Sequence[Tensor], prior: Tensor) -> Tensor | list[Tensor]:
        """Return logits."""
        *finer, bottleneck = skips
        priors = self.at_levels(prior)
        # nnU-Net's decoder puts the skip after what comes from below, so the prior is last.
        joined = [torch.cat((s, p.to(s.dtype)), dim=1) for s, p in zip(finer, priors, strict=True)]
        return super().forward([*joined, bottleneck])

    def at_levels(self, prior: Tensor) -> list[Tensor]:
        """The prior at the resolution of each level that has a skip, finest first."""
        return [self._at_level(prior, strides) for strides in self.level_strides]

    def _at_level(self, prior: Tensor, strides: Sequence[int]) -> Tensor:
        if self.resampling == "nearest":
            return downsample_labels(prior, strides)
        kernel = tuple(strides)
        return functional.max_pool3d(prior, kernel) if len(kernel) == 3 else functional.max_pool2d(prior, kernel)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that training keeps per sample: those of nnU-Net's decoder, and the prior of each level."""
        voxels = [
            prod(size // stride for size, stride in zip(input_size, strides, strict=True))
            for strides in self.level_strides
        ]
        return int(super().compute_conv_feature_map_size(input_size)) + self.prior_channels * sum(voxels)
