"""What the stages of the reversible networks share: arguments of nnU-Net's plans, checked, and their blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from nnunet_ext.architectures.common.plan_arguments import PerStage, PlanArguments
from nnunet_ext.architectures.common.plan_sizes import check_stages, check_weights
from nnunet_ext.architectures.reversible.coupling import AdditiveCoupling, ExactRange
from nnunet_ext.architectures.reversible.frugal import FrugalLeakyReLU
from nnunet_ext.architectures.reversible.sequence import ReversibleSequence

# Samples are recomputed together up to this many elements of a stage's feature map (32 MiB in float32): enough
# to fill a GPU, small compared with what a full-resolution stage holds.
GROUP_ELEMENTS = 2**23


@dataclass(frozen=True, kw_only=True)
class ReversiblePlan(PlanArguments):
    """Arguments of plans, and the layers that reversible networks build from them."""

    def conv(self, in_channels: int, out_channels: int, kernel_size: Sequence[int], stride: Sequence[int]) -> nn.Module:
        """A bare convolution: (B, C_in, *spatial) -> (B, C_out, *spatial / stride)."""
        padding = [(k - 1) // 2 for k in kernel_size]
        return self.conv_op(in_channels, out_channels, kernel_size, stride, padding, bias=self.conv_bias)

    def shift(self, channels: int, kernel_size: Sequence[int], preactivation: bool) -> nn.Module:
        """One f or g of a coupling: (B, C, *spatial) -> (B, C, *spatial)."""
        self.check_nonlin([channels])
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
            nonlin = FrugalLeakyReLU if self.nonlin is nn.LeakyReLU else self.nonlin
            layers.append(nonlin(**nonlin_kwargs))
        layers.append(self.conv(channels, channels, kernel_size, [1] * len(kernel_size)))
        if self.dropout_op is not None:
            layers.append(self.dropout_op(**self.dropout_op_kwargs))
        return nn.Sequential(*layers)

    def conv_norm_nonlin(
        self, in_channels: int, out_channels: int, kernel_size: Sequence[int], stride: Sequence[int]
    ) -> list[nn.Module]:
        """Convolution, norm and nonlinearity: (B, C_in, *spatial) -> (B, C_out, *spatial / stride)."""
        self.check_nonlin([out_channels])
        layers = [self.conv(in_channels, out_channels, kernel_size, stride)]
        if self.norm_op is not None:
            layers.append(self.norm_op(out_channels, **self.norm_op_kwargs))
        if self.nonlin is not None:
            layers.append(self.nonlin(**self.nonlin_kwargs))
        return layers

    @property
    def samples_are_independent(self) -> bool:
        """Whether the norm has no statistics over the batch."""
        return samples_are_independent(self.norm_op, self.norm_op_kwargs)

    def stages(
        self, blocks_per_stage: PerStage | None, fit: Callable[[list[int], list[list[int]]], list[int]] | None = None
    ) -> list[StageSpec]:
        """Check what the plans say of the stages, finest first.

        Args:
            blocks_per_stage: Instead of the plans' depths; None: those of the plans.
            fit: Rounds features for the strides, where the network needs it.

        Raises:
            ValueError: see `PlanArguments.check`; odd features.
        """
        check_stages("reversible network", self.n_stages)
        encoder, decoder = self.depths("reversible network", blocks_per_stage)
        features, kernels, steps = self.features(), self.kernels(), self.steps()
        upwards = [*decoder[::-1], 0]  # the coarsest stage has no decoder
        depths = [down + up for down, up in zip(encoder, upwards, strict=True)]
        check_weights(features, kernels, steps, depths)
        if fit:
            features = fit(features, steps)
            check_weights(features, kernels, steps, depths)
        for i, channels in enumerate(features):
            if channels % 2:
                raise ValueError(
                    f"Reversible stages split their channels in two halves: stage {i} has {channels} features; "
                    f"use {max(2, channels - 1)} or {channels + 1} in features_per_stage {features}."
                )
        stages = zip(features, kernels, steps, encoder, upwards, strict=True)
        return [
            StageSpec(channels=n, kernel_size=kernel, stride=stride, encoder_blocks=down, decoder_blocks=up)
            for n, kernel, stride, down, up in stages
        ]


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One resolution: channels, kernel, stride that leads into it, couplings in encoder and decoder."""

    channels: int
    kernel_size: Sequence[int]
    stride: Sequence[int]
    encoder_blocks: int
    decoder_blocks: int


@dataclass(frozen=True, kw_only=True)
class CouplingSpec:
    """How the couplings of all stages are built; options of the reversible networks."""

    reversible: bool
    exact: bool
    preactivation: bool
    exact_range: ExactRange = field(default_factory=ExactRange)

    def couplings(self, plan: ReversiblePlan, stage: StageSpec, blocks: int) -> list[AdditiveCoupling]:
        """Couplings of one stage."""

        def shift() -> nn.Module:
            return plan.shift(stage.channels // 2, stage.kernel_size, self.preactivation)

        return [AdditiveCoupling(shift(), shift(), self.exact) for _ in range(blocks)]

    def sequence(self, plan: ReversiblePlan, stage: StageSpec, blocks: int) -> ReversibleSequence:
        """Reversible blocks of one stage: (B, C, *spatial) -> (B, C, *spatial)."""
        return ReversibleSequence(
            self.couplings(plan, stage, blocks),
            reversible=self.reversible,
            group_elements=group_elements(plan),
            exact_range=self.exact_range,
        )


def samples_are_independent(norm_op: type[nn.Module] | None, norm_op_kwargs: Mapping[str, Any]) -> bool:
    """Whether a norm, as plans name it, has no statistics over the batch; None: no norm."""
    if norm_op is None:
        return True
    independent = issubclass(norm_op, (_InstanceNorm, nn.GroupNorm, nn.LayerNorm))
    return independent and not norm_op_kwargs.get("track_running_stats", False)


def group_elements(plan: ReversiblePlan) -> int | None:
    """Elements that are recomputed together; None where the norm mixes samples."""
    return GROUP_ELEMENTS if plan.samples_are_independent else None
