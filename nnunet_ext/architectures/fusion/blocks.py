"""FasterFusion: a partial convolution, a parallel pointwise convolution, and forms of both fused for prediction.

Heinrich, Hagenah 2023, "Make nnUNets Small Again" (MIDL short paper). Different from the paper: the convolutions have
the stride (`downsample="maxpool"` pools after the block, as the paper does); prediction takes the hybrid form, smaller
and faster than the paper's one T-shaped convolution (`form="t"`); dimension, kernel, divisor and eps are free.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from dynamic_network_architectures.building_blocks.helper import (
    convert_conv_op_to_dim,
    get_matching_batchnorm,
    get_matching_pool_op,
    maybe_convert_scalar_to_list,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import type_before_parametrizations

from nnunet_ext.architectures.common.onednn import convolve
from nnunet_ext.architectures.fusion.folding import is_standard

Form = Literal["hybrid", "t", "dense"]
Downsample = Literal["stride", "maxpool"]
_EXPANSION = 2


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a block.

    Args:
        conv_op: Convolution of the wanted dimension.
        input_channels: Channels of the input, C_i.
        output_channels: Channels of the output, C_o.
        kernel_size: Kernel per axis, odd.
        stride: Stride per axis.
        divisor: One of so many input channels meets the kernel, the others are mixed pointwise.
        inputs: Number of equal parts that the input is a concatenation of; the kernel meets the first channels of each.
        downsample: "stride", or "maxpool" after the block.

    Raises:
        ValueError: too few channels for the divisor, channels that the parts do not divide, an even kernel, a divisor
            below 2, another way to downsample.
    """

    conv_op: Callable[..., Any]
    input_channels: int
    output_channels: int
    kernel_size: Sequence[int]
    stride: Sequence[int]
    divisor: int = 4
    inputs: int = 1
    downsample: Downsample = "stride"

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride"):
            object.__setattr__(self, name, tuple(maybe_convert_scalar_to_list(self.conv_op, getattr(self, name))))
        if self.divisor < 2:
            raise ValueError(f"A FasterFusion block needs a divisor of at least 2, got {self.divisor}: use 2, 4 or 8.")
        if self.input_channels % self.inputs or self.input_channels // self.inputs < self.divisor:
            raise ValueError(
                f"A FasterFusion block needs at least {self.divisor} channels (its divisor) in each of its "
                f"{self.inputs} equal inputs, got {self.input_channels}: use a smaller divisor, or a plain convolution."
            )
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"Kernels must be odd to keep the size, got {list(self.kernel_size)}: use 3.")
        if self.downsample not in ("stride", "maxpool"):
            raise ValueError(f'downsample must be "stride" or "maxpool", got {self.downsample!r}.')

    @property
    def spatial_input(self) -> int:
        """Input channels that meet the kernel."""
        return self.inputs * (self.input_channels // self.inputs // self.divisor)

    @property
    def spatial_output(self) -> int:
        """Channels that the kernel makes."""
        return max(1, self.expanded // self.divisor)

    @property
    def expanded(self) -> int:
        """Channels between the convolutions and the projection."""
        return _EXPANSION * self.output_channels

    @property
    def conv_stride(self) -> tuple[int, ...]:
        """Stride of the convolutions, per axis."""
        return tuple(self.stride) if self.downsample == "stride" else (1,) * len(self.stride)

    def conv(self, input_channels: int, output_channels: int, bias: bool, **factory: Any) -> Any:
        """Make a convolution with the kernel: (B, input_channels, *s) -> (B, output_channels, *s / stride)."""
        padding = [k // 2 for k in self.kernel_size]
        return self.conv_op(
            input_channels, output_channels, self.kernel_size, self.conv_stride, padding, bias=bias, **factory
        )

    def pointwise(
        self, input_channels: int, output_channels: int, bias: bool, strided: bool = False, **factory: Any
    ) -> Any:
        """Make a 1x1x1 convolution: (B, input_channels, *s) -> (B, output_channels, *s), or *s / stride."""
        stride = self.conv_stride if strided else 1
        return self.conv_op(input_channels, output_channels, 1, stride, 0, bias=bias, **factory)

    def pool(self) -> nn.Module | None:
        """What follows the block."""
        if self.conv_stride == tuple(self.stride):
            return None
        return get_matching_pool_op(self.conv_op, pool_type="max")(self.stride, self.stride)

    def split(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Channels for the kernel, and parts of the others: (B, C_i, *s) -> (B, spatial_input, *s), [(B, ., *s)]."""
        share = self.spatial_input // self.inputs
        parts = x.chunk(self.inputs, 1)
        spatial = [part[:, :share] for part in parts]
        return spatial[0] if self.inputs == 1 else torch.cat(spatial, 1), [part[:, share:] for part in parts]

    def strided(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Take every stride-th voxel, as a pointwise convolution with stride does."""
        steps = (slice(None), slice(None), *(slice(None, None, s) for s in self.conv_stride))
        return [part[steps] for part in parts]

    def unsplit(self, spatial: Tensor, rest: Tensor) -> Tensor:
        """Join weights per input channel in the order of the input: (C_o, ., *k) twice -> (C_o, C_i, *k)."""
        pairs = zip(spatial.chunk(self.inputs, 1), rest.chunk(self.inputs, 1), strict=True)
        return torch.cat([half for pair in pairs for half in pair], 1)

    def output_size(self, input_size: Sequence[int]) -> list[int]:
        """Voxels per axis after the block."""
        return [n // s for n, s in zip(input_size, self.stride, strict=True)]


class _Block(nn.Module):
    """What the training form and the fused forms share: geometry, and what follows the linear part."""

    def __init__(self, geometry: Geometry, nonlin: nn.Module | None) -> None:
        super().__init__()
        self.geometry = geometry
        self.nonlin = nonlin
        self.pool = geometry.pool()

    def _finish(self, x: Tensor) -> Tensor:
        x = x if self.nonlin is None else self.nonlin(x)
        return x if self.pool is None else self.pool(x)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that training keeps, in the unit of nnU-Net's PlainConvUNet (one for a convolution and its norm)."""
        return self.geometry.output_channels * prod(self.geometry.output_size(input_size))


class FasterFusionBlock(_Block):
    """``y = act(P BatchNorm(cat(A x_1, B x_2)) + p)``: A has the kernel, B and P are pointwise.

    x_1 are C_i / divisor channels, x_2 the others; A gives 2 C_o / divisor channels, B the rest of 2 C_o. There is no
    nonlinearity between A, B, norm and P, so `fuse` makes fewer operations of them.

    Args:
        geometry: Sizes.
        conv_bias: Whether A, B and P have biases.
        norm_op_kwargs: Eps and momentum of the batch norm; other entries belong to other norms.
        dropout: Dropout after the projection; None: none.
        nonlin: None: none.

    Shape: (B, C_i, *spatial) -> (B, C_o, *spatial / stride)
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        conv_bias: bool = True,
        norm_op_kwargs: Mapping[str, Any] | None = None,
        dropout: nn.Module | None = None,
        nonlin: nn.Module | None = None,
    ) -> None:
        super().__init__(geometry, nonlin)
        g = geometry
        self.spatial = g.conv(g.spatial_input, g.spatial_output, conv_bias)
        self.pointwise = g.pointwise(
            g.input_channels - g.spatial_input, g.expanded - g.spatial_output, conv_bias, strided=True
        )
        self.norm = _batch_norm(g.conv_op, g.expanded, norm_op_kwargs)
        self.projection = g.pointwise(g.expanded, g.output_channels, conv_bias)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Run the training form."""
        spatial, rest = self.geometry.split(x)
        others = rest[0] if len(rest) == 1 else torch.cat(rest, 1)
        x = torch.cat([self.spatial(spatial), self.pointwise(others)], 1)  # (B, 2 C_o, *spatial / stride)
        x = self.projection(self.norm(x))
        return self._finish(x if self.dropout is None else self.dropout(x))

    @property
    def can_fuse(self) -> bool:
        """Whether its parts are still of the kinds that it was built from, which `fuse` knows."""
        g, norm = self.geometry, self.norm
        convs: list[Any] = [self.spatial, self.pointwise, self.projection]
        return (
            all(type_before_parametrizations(conv) is g.conv_op for conv in convs)
            and all(conv.groups == 1 and set(conv.dilation) == {1} for conv in convs)
            and all(conv.padding_mode == "zeros" for conv in convs)
            and is_standard(norm, _BatchNorm)
            and norm.running_mean is not None
            and (self.dropout is None or is_standard(self.dropout, _DropoutNd))
        )

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that training keeps, in the unit of nnU-Net's PlainConvUNet.

        A convolution of nnU-Net keeps its output and that of the norm; this block keeps 2 C_o before and 2 C_o after
        the norm, and C_o after the projection. Max pooling keeps 64-bit indices as well.
        """
        g = self.geometry
        output = g.output_channels * prod(g.output_size(input_size))
        if self.pool is None:
            return 5 * output // 2
        return 5 * g.output_channels * prod(input_size) // 2 + 5 * output // 2

    def fuse(self, form: Form = "hybrid") -> FusedBlock:
        """Return the block with batch norm and projection folded, computed in float64; this one stays as it is.

        Args:
            form: "hybrid": A stays, B and P become one. "t", the paper's: A and P become one convolution, B and P
                another. "dense": one plain convolution.

        Raises:
            ValueError: another form, parts that were replaced, or a batch norm without running statistics.
        """
        if not self.can_fuse:
            parts = [self.spatial, self.pointwise, self.norm, self.projection, self.dropout]
            raise ValueError(
                "A FasterFusion block can only be fused with plain convolutions, batch norm with running statistics "
                f"and dropout, as it was built, got {parts}: predict with it as it was trained."
            )
        weight = self.spatial.weight
        fused = fused_block(form, self.geometry, copy.deepcopy(self.nonlin), device=weight.device, dtype=weight.dtype)
        scale, shift = _scale_and_shift(self.norm)
        projection = _double(self.projection.weight).flatten(1)  # (C_o, 2 C_o)
        n = self.geometry.spatial_output
        scaled = projection * scale
        biases = torch.cat([_bias(self.spatial), _bias(self.pointwise)])
        bias = projection @ (scale * biases + shift) + _bias(self.projection)
        pointwise = scaled[:, n:] @ _double(self.pointwise.weight).flatten(1)  # (C_o, C_i - spatial_input)
        with torch.no_grad():
            fused.take(_double(weight), scaled[:, :n], pointwise, bias)
        return fused.train(self.training)


class FusedBlock(_Block):
    """A block without norm. Built from the same geometry, the forms of equal blocks load each other's weights."""

    def take(self, spatial: Tensor, mix: Tensor, pointwise: Tensor, bias: Tensor) -> None:
        """Set the weights.

        Args:
            spatial: Kernel of A, (S, spatial_input, *kernel).
            mix: Projection that follows A, norm included, (C_o, S).
            pointwise: Product of B, its norm and the projection, (C_o, C_i - spatial_input).
            bias: (C_o,).
        """
        raise NotImplementedError


class HybridBlock(FusedBlock):
    """``y = act(Q cat(A x_1, x_2) + q)``.

    Shape: (B, C_i, *spatial) -> (B, C_o, *spatial / stride)
    """

    def __init__(self, geometry: Geometry, nonlin: nn.Module | None = None, **factory: Any) -> None:
        super().__init__(geometry, nonlin)
        g = geometry
        self.spatial = g.conv(g.spatial_input, g.spatial_output, bias=False, **factory)
        others = g.input_channels - g.spatial_input
        self.projection = g.pointwise(g.spatial_output + others, g.output_channels, True, **factory)

    def take(self, spatial: Tensor, mix: Tensor, pointwise: Tensor, bias: Tensor) -> None:
        """Set the weights."""
        self.spatial.weight.copy_(spatial)
        self.projection.weight.copy_(torch.cat([mix, pointwise], 1).view_as(self.projection.weight))
        self.projection.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Run the kernel on its share, then mix all."""
        spatial, rest = self.geometry.split(x)
        x = torch.cat([convolve(self.spatial, spatial), *self.geometry.strided(rest)], 1)
        return self._finish(convolve(self.projection, x))


class TShapedBlock(FusedBlock):
    """``y = act(T x_1 + R x_2 + r)``: one convolution whose kernel is a single voxel for most channels.

    Shape: (B, C_i, *spatial) -> (B, C_o, *spatial / stride)
    """

    def __init__(self, geometry: Geometry, nonlin: nn.Module | None = None, **factory: Any) -> None:
        super().__init__(geometry, nonlin)
        g = geometry
        self.spatial = g.conv(g.spatial_input, g.output_channels, bias=True, **factory)
        others = g.input_channels - g.spatial_input
        self.pointwise = g.pointwise(others, g.output_channels, False, strided=True, **factory)

    def take(self, spatial: Tensor, mix: Tensor, pointwise: Tensor, bias: Tensor) -> None:
        """Set the weights."""
        self.spatial.weight.copy_((mix @ spatial.flatten(1)).view_as(self.spatial.weight))
        self.spatial.bias.copy_(bias)
        self.pointwise.weight.copy_(pointwise.view_as(self.pointwise.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Add the two shares."""
        spatial, rest = self.geometry.split(x)
        others = rest[0] if len(rest) == 1 else torch.cat(rest, 1)
        return self._finish(convolve(self.spatial, spatial) + convolve(self.pointwise, others))


class DenseBlock(FusedBlock):
    """``y = act(D x + r)``: a plain convolution, larger than what it replaces; for programs that know nothing else.

    Shape: (B, C_i, *spatial) -> (B, C_o, *spatial / stride)
    """

    def __init__(self, geometry: Geometry, nonlin: nn.Module | None = None, **factory: Any) -> None:
        super().__init__(geometry, nonlin)
        self.conv = geometry.conv(geometry.input_channels, geometry.output_channels, bias=True, **factory)

    def take(self, spatial: Tensor, mix: Tensor, pointwise: Tensor, bias: Tensor) -> None:
        """Set the weights: those of single voxels at the kernel's centre."""
        g = self.geometry
        shape = self.conv.weight.shape[2:]
        t_shaped = (mix @ spatial.flatten(1)).view(g.output_channels, g.spatial_input, *shape)
        rest = t_shaped.new_zeros(g.output_channels, g.input_channels - g.spatial_input, *shape)
        centre = (slice(None), slice(None), *(k // 2 for k in shape))
        rest[centre] = pointwise
        self.conv.weight.copy_(g.unsplit(t_shaped, rest))
        self.conv.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        return self._finish(convolve(self.conv, x))


_FORMS: dict[str, type[FusedBlock]] = {"hybrid": HybridBlock, "t": TShapedBlock, "dense": DenseBlock}


def fused_block(form: Form, geometry: Geometry, nonlin: nn.Module | None = None, **factory: Any) -> FusedBlock:
    """Make an empty fused block, into which the state_dict of an equal one loads; `factory`: device and dtype.

    Raises:
        ValueError: there is no such form.
    """
    if form not in _FORMS:
        raise ValueError(f"form must be one of {', '.join(_FORMS)}, got {form!r}.")
    return _FORMS[form](geometry, nonlin, **factory)


def _batch_norm(conv_op: Callable[..., Any], channels: int, norm_op_kwargs: Mapping[str, Any] | None) -> nn.Module:
    """Make a batch norm with the eps and momentum of any norm's arguments."""
    kwargs = {key: value for key, value in (norm_op_kwargs or {}).items() if key in ("eps", "momentum")}
    return get_matching_batchnorm(dimension=convert_conv_op_to_dim(conv_op))(channels, **kwargs)


def _double(x: Tensor) -> Tensor:
    """`x` in float64, on the CPU because not every device has it."""
    return x.detach().to("cpu", torch.float64)


def _bias(conv: Any) -> Tensor:
    """Bias in float64; zeros where there is none."""
    weight = _double(conv.weight)
    return weight.new_zeros(len(weight)) if conv.bias is None else _double(conv.bias)


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """A batch norm in evaluation as ``scale * x + shift``, in float64."""
    scale = (_double(norm.running_var) + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * _double(norm.weight)
    shift = -_double(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + _double(norm.bias)
