"""Partially reversible U-Net: reversible stages, joined by transitions that keep nothing of their own.

Bruegger, Baumgartner, Konukoglu 2019, "A Partially Reversible U-Net for Memory-Efficient Volumetric Image
Segmentation", https://arxiv.org/abs/1906.06148. Different from the paper: sizes, strides, kernels, norm and depth
come from nnU-Net's plans; a bare strided convolution leads down (paper: max pooling, then 1x1x1 convolution, whose
indices would be kept) and a bare transposed convolution up (paper: 1x1x1 convolution, then trilinear upsampling).
As in the paper, skips are added, not concatenated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from dynamic_network_architectures.building_blocks.helper import (
    convert_conv_op_to_dim,
    get_matching_convtransp,
    maybe_convert_scalar_to_list,
)
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from nnunet_ext.architectures.blocks.mixed_precision import convolve
from nnunet_ext.architectures.blocks.reversible import AdditiveCoupling, ReversibleSequence

# Samples are recomputed together up to this many elements of a stage's feature map (32 MiB in float32): enough
# to fill a GPU, small beside what a full-resolution stage holds.
GROUP_ELEMENTS = 2**23

# Bytes at the peak of a mixed-precision training step of PlainConvUNet, in 2D and 3D, for each element that its
# compute_conv_feature_map_size counts; see tests/architectures/test_reversible_unet.py.
BYTES_PER_COUNTED_ELEMENT = {2: 4.87, 3: 5.21}


@dataclass(frozen=True)
class ConvSpec:
    """What all convolutions of a network share; names and meaning as in nnU-Net's plans."""

    conv_op: Callable[..., nn.Module]
    conv_bias: bool
    norm_op: type[nn.Module] | None
    norm_op_kwargs: Mapping[str, Any]
    dropout_op: type[_DropoutNd] | None
    dropout_op_kwargs: Mapping[str, Any]
    nonlin: type[nn.Module] | None
    nonlin_kwargs: Mapping[str, Any]

    def conv(
        self, in_channels: int, out_channels: int, kernel_size: Sequence[int], stride: Sequence[int]
    ) -> nn.Module:
        """A bare convolution: (B, C_in, *spatial) -> (B, C_out, *spatial / stride)."""
        padding = [(k - 1) // 2 for k in kernel_size]
        return self.conv_op(in_channels, out_channels, kernel_size, stride, padding, bias=self.conv_bias)

    def shift(self, channels: int, kernel_size: Sequence[int], preactivation: bool) -> nn.Module:
        """One f or g of a coupling: (B, C, *spatial) -> (B, C, *spatial)."""
        # In place saves nothing where all is recomputed, and costs two copies in the backward pass of what is a view,
        # as the output of instance norm is. Without a norm it would change the stream itself.
        nonlin_kwargs = {k: False if k == "inplace" else v for k, v in self.nonlin_kwargs.items()}
        if not preactivation:
            return ConvDropoutNormReLU(
                self.conv_op,
                channels,
                channels,
                kernel_size,
                1,
                self.conv_bias,
                self.norm_op,
                dict(self.norm_op_kwargs),
                self.dropout_op,
                dict(self.dropout_op_kwargs),
                self.nonlin,
                nonlin_kwargs,
            )
        layers: list[nn.Module] = []
        if self.norm_op is not None:
            layers.append(self.norm_op(channels, **self.norm_op_kwargs))
        if self.nonlin is not None:
            layers.append(self.nonlin(**nonlin_kwargs))
        layers.append(self.conv(channels, channels, kernel_size, [1] * len(kernel_size)))
        if self.dropout_op is not None:
            layers.append(self.dropout_op(**self.dropout_op_kwargs))
        return nn.Sequential(*layers)

    @property
    def samples_are_independent(self) -> bool:
        """Whether the norm has no statistics over the batch."""
        if self.norm_op is None:
            return True
        independent = issubclass(self.norm_op, (_InstanceNorm, nn.GroupNorm, nn.LayerNorm))
        return independent and not self.norm_op_kwargs.get("track_running_stats", False)


@dataclass(frozen=True)
class StageSpec:
    """One resolution: channels, kernel, stride that leads into it, couplings in encoder and decoder."""

    channels: int
    kernel_size: Sequence[int]
    stride: Sequence[int]
    encoder_blocks: int
    decoder_blocks: int


@dataclass(frozen=True)
class CouplingSpec:
    """How the couplings of all stages are built; the options of `ReversibleUNet`."""

    reversible: bool
    exact: bool
    preactivation: bool

    def sequence(self, spec: ConvSpec, stage: StageSpec, blocks: int) -> ReversibleSequence:
        """Reversible blocks of one stage: (B, C, *spatial) -> (B, C, *spatial)."""

        def shift() -> nn.Module:
            return spec.shift(stage.channels // 2, stage.kernel_size, self.preactivation)

        return ReversibleSequence(
            [AdditiveCoupling(shift(), shift(), self.exact) for _ in range(blocks)],
            reversible=self.reversible,
            group_elements=GROUP_ELEMENTS if spec.samples_are_independent else None,
        )


class Encoder(nn.Module):
    """Stages from the finest to the coarsest: a bare (strided) convolution, then couplings.

    Shape: (B, C_in, *patch) -> list of (B, C_s, *patch / cumulative stride).
    """

    def __init__(
        self, input_channels: int, spec: ConvSpec, stages: Sequence[StageSpec], coupling: CouplingSpec
    ) -> None:
        super().__init__()
        channels = [input_channels, *(stage.channels for stage in stages)]
        self.transitions = nn.ModuleList(
            spec.conv(below, stage.channels, stage.kernel_size, stage.stride)
            for below, stage in zip(channels, stages, strict=False)
        )
        self.stages = nn.ModuleList(coupling.sequence(spec, stage, stage.encoder_blocks) for stage in stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the output of every stage; these are the skips."""
        skips = []
        for transition, stage in zip(self.transitions, self.stages, strict=True):
            x = stage(convolve(transition, x))
            skips.append(x)
        return skips


class Decoder(nn.Module):
    """Stages from the coarsest to the finest: a transposed convolution, the skip added, couplings, a head.

    Shape: list of skips -> (B, num_classes, *patch), or with deep supervision a list of them, largest first.
    """

    def __init__(
        self,
        num_classes: int,
        spec: ConvSpec,
        stages: Sequence[StageSpec],
        coupling: CouplingSpec,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        conv_transposed = get_matching_convtransp(conv_op=spec.conv_op)
        pairs = list(zip(stages[::-1], stages[-2::-1], strict=False))  # (coarser, finer), coarsest first
        self.transitions = nn.ModuleList(
            conv_transposed(coarse.channels, fine.channels, coarse.stride, coarse.stride, bias=spec.conv_bias)
            for coarse, fine in pairs
        )
        self.stages = nn.ModuleList(coupling.sequence(spec, fine, fine.decoder_blocks) for _, fine in pairs)
        # All heads exist with and without deep supervision, so that checkpoints fit both (as in nnU-Net).
        self.seg_layers = nn.ModuleList(
            spec.conv_op(fine.channels, num_classes, 1, 1, 0, bias=True) for _, fine in pairs
        )

    def forward(self, skips: list[Tensor]) -> Tensor | list[Tensor]:
        """Return logits of the finest stage, or with deep supervision of every stage, largest first."""
        x = skips[-1]
        outputs = []
        last = len(self.stages) - 1
        for i, skip in enumerate(skips[-2::-1]):
            x = self.stages[i](convolve(self.transitions[i], x) + skip)
            if self.deep_supervision or i == last:
                outputs.append(convolve(self.seg_layers[i], x))
        return outputs[::-1] if self.deep_supervision else outputs[0]


class ReversibleUNet(nn.Module):
    """Partially reversible U-Net (Bruegger et al. 2019): training memory independent of the blocks per stage.

    Of each stage, encoder and decoder, training keeps one feature map. Built from nnU-Net's plans, default or
    ResEnc; arguments that are not listed mean what they mean there.

    Args:
        input_channels: channels of the image.
        num_classes: channels of the logits.
        n_conv_per_stage: blocks per encoder stage, from default plans.
        n_blocks_per_stage: the same, from ResEnc plans; one of both is given.
        n_conv_per_stage_decoder: blocks per decoder stage, coarsest first.
        deep_supervision: return a list of logits, largest first.
        blocks_per_stage: overrides the depth of the plans: one number for all stages of encoder and decoder, or
            one per resolution, finest first, for both. None: from the plans.
        reversible: False keeps all activations: same weights and outputs, plain autograd, the reference of tests.
        exact: bit-exact inversion, see `nnunet_ext.architectures.blocks.reversible`.
        preactivation: norm, nonlinearity, convolution within a block (True), or nnU-Net's convolution, norm,
            nonlinearity (False). docs/methods/reversible.md holds the comparison.

    Shape: (B, input_channels, *patch) -> (B, num_classes, *patch), or a list of (B, num_classes, *patch / scale);
        patch divisible by the cumulative strides.

    Raises:
        ValueError: odd number of features, lists that do not fit n_stages, fewer than two stages, even kernels,
            a depth below 1, both or neither of n_conv_per_stage and n_blocks_per_stage.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        n_stages: int,
        features_per_stage: int | Sequence[int],
        conv_op: type[_ConvNd],
        kernel_sizes: int | Sequence[int | Sequence[int]],
        strides: int | Sequence[int | Sequence[int]],
        n_conv_per_stage: int | Sequence[int] | None = None,
        n_blocks_per_stage: int | Sequence[int] | None = None,
        n_conv_per_stage_decoder: int | Sequence[int],
        conv_bias: bool = False,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: Mapping[str, Any] | None = None,
        dropout_op: type[_DropoutNd] | None = None,
        dropout_op_kwargs: Mapping[str, Any] | None = None,
        nonlin: type[nn.Module] | None = None,
        nonlin_kwargs: Mapping[str, Any] | None = None,
        deep_supervision: bool = False,
        blocks_per_stage: int | Sequence[int] | None = None,
        reversible: bool = True,
        exact: bool = False,
        preactivation: bool = True,
    ) -> None:
        super().__init__()
        if (n_conv_per_stage is None) == (n_blocks_per_stage is None):
            raise ValueError(
                "ReversibleUNet needs either n_conv_per_stage (default plans) or n_blocks_per_stage (ResEnc plans), "
                f"got {n_conv_per_stage} and {n_blocks_per_stage}."
            )
        encoder_blocks, decoder_blocks = n_conv_per_stage or n_blocks_per_stage, n_conv_per_stage_decoder
        if blocks_per_stage is not None:
            per_stage = _per_stage("blocks_per_stage", blocks_per_stage, n_stages)
            encoder_blocks, decoder_blocks = per_stage, per_stage[-2::-1]
        self.stages = _stage_specs(
            conv_op,
            n_stages,
            features_per_stage=features_per_stage,
            kernel_sizes=kernel_sizes,
            strides=strides,
            encoder_blocks=encoder_blocks,
            decoder_blocks=decoder_blocks,
        )
        self.dim = convert_conv_op_to_dim(conv_op)
        self.input_channels = input_channels
        self.num_classes = num_classes
        spec = ConvSpec(
            conv_op,
            conv_bias,
            norm_op,
            norm_op_kwargs or {},
            dropout_op,
            dropout_op_kwargs or {},
            nonlin,
            nonlin_kwargs or {},
        )
        self.grouped = spec.samples_are_independent
        coupling = CouplingSpec(reversible, exact, preactivation)
        self.encoder = Encoder(input_channels, spec, self.stages, coupling)
        self.decoder = Decoder(num_classes, spec, self.stages, coupling, deep_supervision)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits; in training with deep supervision a list, largest first."""
        return self.decoder(self.encoder(x))

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initialise a module as nnU-Net's own networks do (He et al. 2015); meant for `Module.apply`."""
        InitWeights_He(1e-2)(module)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Memory per sample at the peak of a training step, in the unit of nnU-Net's PlainConvUNet.

        nnU-Net's planner compares this with a reference count for a GPU memory target, and trains in mixed
        precision: streams in float32, the rest in two bytes. The peak lies in the backward pass of the finest
        decoder stage, or in the loss where there are many classes.

        Args:
            input_size: voxels per axis.
        """
        sizes = []
        size = list(input_size)
        for stage in self.stages:
            size = [voxels // stride for voxels, stride in zip(size, stage.stride, strict=True)]
            sizes.append(prod(size))
        maps = [stage.channels * voxels for stage, voxels in zip(self.stages, sizes, strict=True)]
        kept = 4 * (sum(maps) + sum(maps[:-1]) + self.input_channels * prod(input_size))
        # Logits, their normalisation and their gradient, of every stage that has a head in use.
        heads = sizes[:-1] if self.decoder.deep_supervision else sizes[:1]
        loss = 10 * self.num_classes * sum(heads)
        return int(
            (kept + max(self._walk_back_bytes(maps[0]), loss)) / BYTES_PER_COUNTED_ELEMENT[len(input_size)]
        )

    def _walk_back_bytes(self, finest: int) -> float:
        """Bytes per sample that the backward pass of a stage of `finest` elements needs beside what is kept."""
        # Share of the batch that is recomputed at a time, for the batch sizes that nnU-Net plans for.
        batch_size = 2 if self.dim == 3 else 12
        share = min(1.0, max(1, GROUP_ELEMENTS // finest) / batch_size) if self.grouped else 1.0
        # Gradients of the stage's output and, where its samples go in groups, of its input (of the groups done, or
        # with many groups all of it).
        gradients = 4.0 if share == 1.0 else 4.0 * (2.0 - share) if share > 0.3 else 8.0
        # For the group in work three halves of streams and two of gradients in float32, four inside f or g.
        return (gradients + 14.0 * share) * finest


def _per_stage(name: str, values: Any, n: int) -> list[Any]:
    """Repeat one value `n` times; check the length of a list."""
    if isinstance(values, int):
        return [values] * n
    if len(values) != n:
        raise ValueError(f"{name} needs one number or {n} of them (n_stages), got {list(values)}.")
    return list(values)


def _stage_specs(
    conv_op: type[_ConvNd],
    n_stages: int,
    *,
    features_per_stage: Any,
    kernel_sizes: Any,
    strides: Any,
    encoder_blocks: Any,
    decoder_blocks: Any,
) -> list[StageSpec]:
    """Check what the plans say of the stages, finest first."""
    if n_stages < 2:
        raise ValueError(
            f"A ReversibleUNet needs at least 2 stages, got n_stages={n_stages}: plan a larger patch."
        )
    dim = convert_conv_op_to_dim(conv_op)
    features = _per_stage("features_per_stage", features_per_stage, n_stages)
    kernels = [
        _per_axis("kernel_sizes", conv_op, dim, k) for k in _per_stage("kernel_sizes", kernel_sizes, n_stages)
    ]
    steps = [_per_axis("strides", conv_op, dim, s) for s in _per_stage("strides", strides, n_stages)]
    encoder = _per_stage("blocks per encoder stage", encoder_blocks, n_stages)
    decoder = _per_stage("n_conv_per_stage_decoder", decoder_blocks, n_stages - 1)[::-1]
    for i, channels in enumerate(features):
        if channels % 2:
            raise ValueError(
                f"Reversible stages split their channels in two halves: stage {i} has {channels} features; "
                f"use {channels - 1} or {channels + 1} in features_per_stage {features}."
            )
        if any(k % 2 == 0 for k in kernels[i]):
            raise ValueError(f"Kernels must be odd to keep the size, stage {i} has kernel size {kernels[i]}.")
    if min(*encoder, *decoder) < 1:
        raise ValueError(
            f"Every stage needs at least one block, got encoder {encoder}, decoder {decoder[::-1]}."
        )
    # The coarsest stage has no decoder.
    return [
        StageSpec(*values) for values in zip(features, kernels, steps, encoder, [*decoder, 0], strict=True)
    ]


def _per_axis(name: str, conv_op: type[_ConvNd], dim: int, value: Any) -> list[int]:
    values = list(maybe_convert_scalar_to_list(conv_op, value))
    if len(values) != dim:
        raise ValueError(f"{name} need {dim} numbers per stage for {conv_op.__name__}, got {values}.")
    return values
