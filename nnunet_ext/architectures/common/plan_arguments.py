"""The arguments of a U-Net as nnU-Net's plans hold them, default or ResEnc: checked, once, for all networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, get_type_hints

from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from nnunet_ext.architectures.common.operations import check_conv, check_operation
from nnunet_ext.architectures.common.plan_sizes import (
    check_depths,
    check_first_stride,
    check_norm,
    check_odd,
    check_stages,
    check_weights,
    check_whole,
    per_stage_and_axis,
    per_stage_list,
)
from nnunet_ext.architectures.common.plan_values import check_values

if TYPE_CHECKING:
    from typing_extensions import Self

PerStage = int | Sequence[int]
PerStageAndAxis = int | Sequence[int | Sequence[int]]
_OPERATIONS = ("norm_op", "dropout_op", "nonlin")
_GIVEN = {"self", "input_channels", "num_classes"}  # by nnU-Net, never by plans


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """What plans say of a U-Net; networks take these as keyword arguments in addition to options of their own.

    Args:
        n_stages: Number of resolutions.
        features_per_stage: Channels of each, finest first.
        conv_op: Convolution, 2D or 3D.
        kernel_sizes, strides: Voxels per stage and axis; the stride leads into the stage.
        n_conv_per_stage: Blocks per encoder stage, from default plans.
        n_blocks_per_stage: Residual blocks per encoder stage, from ResEnc plans; one of both is given.
        n_conv_per_stage_decoder: Blocks per decoder stage, coarsest first.
        conv_bias: Whether convolutions have one.
        norm_op, norm_op_kwargs: Norm; None: none.
        dropout_op, dropout_op_kwargs: Dropout; None: none.
        nonlin, nonlin_kwargs: Nonlinearity; None: none.

    Raises:
        ValueError: a value of another type, a convolution of other than two or three axes, a norm that takes more than
            channels, a layer that can't run on the feature maps.
    """

    n_stages: int
    features_per_stage: PerStage
    conv_op: type[Any]  # nn.Conv2d or nn.Conv3d
    kernel_sizes: PerStageAndAxis
    strides: PerStageAndAxis
    n_conv_per_stage: PerStage | None = None
    n_blocks_per_stage: PerStage | None = None
    n_conv_per_stage_decoder: PerStage | None = None
    conv_bias: bool = False
    norm_op: type[nn.Module] | None = None
    norm_op_kwargs: Mapping[str, Any] = field(default_factory=dict)
    dropout_op: type[_DropoutNd] | None = None
    dropout_op_kwargs: Mapping[str, Any] = field(default_factory=dict)
    nonlin: type[nn.Module] | None = None
    nonlin_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _OPERATIONS:
            options = getattr(self, f"{name}_kwargs")  # None in plans
            object.__setattr__(self, f"{name}_kwargs", {} if options is None else options)
        check_values(get_type_hints(type(self)), vars(self))
        check_conv(self.conv_op)
        check_norm(self.norm_op)
        for name in _OPERATIONS:
            object.__setattr__(self, f"{name}_kwargs", dict(getattr(self, f"{name}_kwargs")))
            check_operation(name, getattr(self, name), getattr(self, f"{name}_kwargs"), self.dim)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Take keyword arguments of a network.

        Raises:
            ValueError: one is missing or unknown; see the class.
        """
        known = {item.name: item.default is MISSING and item.default_factory is MISSING for item in fields(cls)}
        missing = [name for name, is_needed in known.items() if is_needed and name not in arguments]
        unknown = sorted(set(arguments) - set(known))
        if missing or unknown:
            raise ValueError(
                f"Plans of a U-Net hold {', '.join(known)}, got {', '.join(sorted(arguments)) or 'none'} (missing: "
                f"{', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}): plan the data set again."
            )
        return cls(**arguments)

    @property
    def dim(self) -> int:
        """Number of spatial axes."""
        return int(convert_conv_op_to_dim(self.conv_op))

    def features(self) -> list[int]:
        """Channels of each stage.

        Raises:
            ValueError: a list of another length, numbers that are no integers or below 1.
        """
        values = per_stage_list("features_per_stage", self.features_per_stage, self.n_stages)
        return check_whole("features_per_stage", values)

    def kernels(self) -> list[list[int]]:
        """Kernel size of each stage and axis.

        Raises:
            ValueError: a list of another length, an even kernel.
        """
        kernels = per_stage_and_axis("kernel_sizes", self.conv_op, self.kernel_sizes, self.n_stages)
        check_odd(kernels)
        return kernels

    def steps(self) -> list[list[int]]:
        """Stride of each stage and axis.

        Raises:
            ValueError: a list of another length, a stride into the first stage.
        """
        steps = per_stage_and_axis("strides", self.conv_op, self.strides, self.n_stages)
        check_first_stride(steps)
        return steps

    def depths(self, kind: str, blocks_per_stage: PerStage | None = None) -> tuple[list[int], list[int]]:
        """Blocks per encoder stage, finest first, and per decoder stage, coarsest first.

        Args:
            kind: What the network is called in a message.
            blocks_per_stage: Instead of the plans' depths, for encoder and decoder; None: those of the plans.

        Raises:
            ValueError: both or neither of n_conv_per_stage and n_blocks_per_stage, a list of another length, a depth
                below 1.
        """
        if (self.n_conv_per_stage is None) == (self.n_blocks_per_stage is None):
            raise ValueError(
                f"A {kind} needs either n_conv_per_stage (default plans) or n_blocks_per_stage (ResEnc plans), got "
                f"{self.n_conv_per_stage} and {self.n_blocks_per_stage}: use plans of nnU-Net's planners."
            )
        encoder = self.n_blocks_per_stage if self.n_conv_per_stage is None else self.n_conv_per_stage
        decoder = self.n_conv_per_stage_decoder
        if blocks_per_stage is not None:
            encoder = per_stage_list("blocks_per_stage", blocks_per_stage, self.n_stages)
            decoder = encoder[-2::-1]
        if decoder is None:
            raise ValueError(f"A {kind} needs n_conv_per_stage_decoder, got none: plan the data set again.")
        found = (
            per_stage_list("blocks per encoder stage", encoder, self.n_stages),
            per_stage_list("n_conv_per_stage_decoder", decoder, self.n_stages - 1),
        )
        check_depths(*found)
        return found

    def check_nonlin(self, widths: Sequence[int]) -> None:
        """Refuse a nonlinearity with a weight for each of another number of channels.

        Args:
            widths: Channels of the feature maps that it runs on.

        Raises:
            ValueError: names both numbers.
        """
        weights = self.nonlin_kwargs.get("num_parameters", 1) if self.nonlin is nn.PReLU else 1
        if weights != 1 and set(widths) != {weights}:
            raise ValueError(
                f"PReLU needs one weight, or one for each channel of its feature maps, got num_parameters {weights} "
                f"for {', '.join(map(str, dict.fromkeys(widths)))} channels: use 1 in nonlin_kwargs."
            )

    def check(self, kind: str) -> None:
        """Say in a sentence what nnU-Net's networks would say by a traceback, or only in training.

        Args:
            kind: What the network is called in a message.

        Raises:
            ValueError: sizes that do not fit n_stages or are out of range, fewer than two stages, more weights than a
                machine holds.
        """
        check_stages(kind, self.n_stages)
        encoder, decoder = self.depths(kind)
        depths = [down + up for down, up in zip(encoder, [*decoder[::-1], 0], strict=True)]
        check_weights(self.features(), self.kernels(), self.steps(), depths)
        self.check_nonlin(self.features())


def parameters_of(network: type[nn.Module]) -> set[str]:
    """Keyword arguments that plans may hold for a network's constructor, with those that it takes together."""
    own = signature(network.__init__).parameters
    together = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in own.values())
    named = {name for name, parameter in own.items() if parameter.kind is not Parameter.VAR_KEYWORD}
    return {*(named - _GIVEN), *(item.name for item in fields(PlanArguments) if together)}
