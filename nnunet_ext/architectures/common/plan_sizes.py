"""Checks of what plans say of a U-Net's stages, and of the patches that its strides divide."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from numbers import Integral
from typing import Any

from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim, maybe_convert_scalar_to_list
from torch import Tensor, nn

from nnunet_ext.architectures.common.norm_statistics import NormStatistics
from nnunet_ext.architectures.common.onednn import is_exporting

_MOST_STAGES = 100
_MOST_BLOCKS = 1000  # of a stage
_MOST_WEIGHTS = 10**10  # 40 GB, more than any GPU trains
_MOST_CHANNELS = 2**16  # as many labels as nnU-Net stores in 16 bits


def per_stage_list(name: str, values: Any, n: int) -> list[Any]:
    """Repeat one value `n` times; check the length of a list.

    Raises:
        ValueError: a list of another length.
    """
    if isinstance(values, Integral):
        return [values] * n
    if len(values) != n:
        raise ValueError(f"{name} needs one number or {n} of them (n_stages), got {list(values)}.")
    return list(values)


def per_stage_and_axis(name: str, conv_op: type[Any], values: Any, n_stages: int) -> list[list[int]]:
    """Kernel sizes or strides of every stage and axis, from one number, one per stage, or all of them.

    Raises:
        ValueError: a list of another length.
    """
    dim = convert_conv_op_to_dim(conv_op)
    stages = [list(maybe_convert_scalar_to_list(conv_op, v)) for v in per_stage_list(name, values, n_stages)]
    for stage in stages:
        if len(stage) != dim:
            raise ValueError(f"{name} need {dim} numbers per stage for {conv_op.__name__}, got {stage}.")
    return [check_whole(name, stage) for stage in stages]


def check_whole(name: str, values: Sequence[Any]) -> list[int]:
    """Sizes as numbers that PyTorch takes.

    Raises:
        ValueError: one is no integer, or below 1.
    """
    if not all(isinstance(v, Integral) and int(v) >= 1 for v in values):
        raise ValueError(f"{name} must be whole numbers of at least 1, got {list(values)}.")
    return [int(v) for v in values]


def check_channels(**numbers: Any) -> None:
    """Refuse an image without channels, logits without classes, and more of them than nnU-Net can store.

    Args:
        numbers: Channels by the name of their argument.

    Raises:
        ValueError: names the argument and its value.
    """
    for name, value in numbers.items():
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not (is_whole and 1 <= int(value) <= _MOST_CHANNELS):
            raise ValueError(
                f"{name} must be a whole number of 1 to {_MOST_CHANNELS}, got {value!r:.80}: correct the channels or "
                "labels of dataset.json."
            )


def check_first_stride(strides: Sequence[Sequence[int]]) -> None:
    """Refuse a network whose finest logits would be coarser than the patch.

    Raises:
        ValueError: the first stage has a stride.
    """
    if max(strides[0]) > 1:
        raise ValueError(
            f"The first stage must keep the size of the patch, got stride {list(strides[0])}: use 1 there, as nnU-Net "
            "plans it."
        )


def check_norm(norm_op: type[nn.Module] | None) -> None:
    """Refuse norms that take more than channels, which nnU-Net's blocks do not give.

    Raises:
        ValueError: the norm is a group norm.
    """
    if norm_op is nn.GroupNorm:
        raise ValueError(
            "nnU-Net builds a norm only from its number of channels, got GroupNorm, which needs num_groups of 1 or "
            "more first: use instance or batch norm, or a subclass of GroupNorm that takes only channels."
        )


def check_stages(kind: str, n_stages: int, least: int = 2) -> None:
    """Refuse a network without a decoder, and one without end.

    Raises:
        ValueError: fewer stages than `least`, or more than any patch can have.
    """
    if n_stages < least:
        raise ValueError(f"A {kind} needs at least {least} stages, got n_stages={n_stages}: plan a larger patch.")
    if n_stages > _MOST_STAGES:
        raise ValueError(
            f"A {kind} has at most {_MOST_STAGES} stages, got n_stages={n_stages}: plan the data set again."
        )


def check_odd(kernels: Sequence[Sequence[int]]) -> None:
    """Refuse even kernels.

    Raises:
        ValueError: names the stage.
    """
    for i, kernel in enumerate(kernels):
        if any(k % 2 == 0 for k in kernel):
            raise ValueError(
                f"Kernels must be odd to keep the size, stage {i} has kernel size {list(kernel)}: use 3, or 1 along "
                "axes of thick slices."
            )


def check_depths(encoder: Sequence[int], decoder: Sequence[int]) -> None:
    """Refuse stages without a block; numbers finest first in the encoder, coarsest first in the decoder.

    Raises:
        ValueError: a stage has none, or more than any network has.
    """
    if min(*encoder, *decoder) < 1:
        raise ValueError(
            f"Every stage needs at least one block, got encoder {list(encoder)}, decoder {list(decoder)}: use 1 or "
            "more."
        )
    if max(*encoder, *decoder) > _MOST_BLOCKS:
        raise ValueError(
            f"A stage has at most {_MOST_BLOCKS} blocks, got encoder {list(encoder)}, decoder {list(decoder)}: use "
            "what nnU-Net plans."
        )


def check_weights(
    features: Sequence[int], kernels: Sequence[Sequence[int]], strides: Sequence[Sequence[int]], depths: Sequence[int]
) -> None:
    """Refuse a network that no machine holds, before it is made.

    Args:
        features, kernels, strides, depths: Sizes of each stage, finest first.

    Raises:
        ValueError: says about how many weights there would be.
    """
    stages = zip(features, kernels, strides, depths, strict=True)
    found = sum(n * n * (depth * prod(kernel) + prod(stride)) for n, kernel, stride, depth in stages)
    if found > _MOST_WEIGHTS:
        raise ValueError(
            f"A network has at most {_MOST_WEIGHTS:.0e} weights, got features {list(features)}, kernels "
            f"{[list(k) for k in kernels]!r:.80} and strides {[list(s) for s in strides]!r:.80} of about {found:.0e}: "
            "use fewer features, or what nnU-Net plans."
        )


def patch_divisors(strides: Sequence[Sequence[int]]) -> list[int]:
    """What each axis of a patch must be a multiple of: the product of the strides per stage and axis."""
    return [prod(axis) for axis in zip(*strides, strict=True)]


def check_patch_size(x: Tensor, divisors: Sequence[int], norms: NormStatistics, training: bool) -> None:
    """Refuse an image that the strides do not divide; not in export, whose sizes are no numbers.

    Args:
        x: Batch of images.
        divisors: What each axis must be a multiple of.
        norms: What the network's norms need of the coarsest feature map.
        training: Whether the network is in training mode.

    Raises:
        ValueError: names the divisor of each axis, or a coarsest feature map of one voxel.
    """
    if is_exporting():
        return
    if any(size % divisor for size, divisor in zip(x.shape[2:], divisors, strict=True)):
        raise ValueError(
            f"The patch must be divisible by {list(divisors)}, the product of the strides, got {list(x.shape[2:])}: "
            "use the patch of nnU-Net's plans, or round it up."
        )
    norms.check(x, [size // divisor for size, divisor in zip(x.shape[2:], divisors, strict=True)], training)
