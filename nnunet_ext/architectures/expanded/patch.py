"""Sizes of meU-net's two patches: the expanded patch kP and the standard patch P, its centre.

Wang, Blackie, Miguel-Aliaga, Bai 2022, "Memory-efficient Segmentation of High-resolution Volumetric MicroCT Images"
(MIDL). Different from the paper: k per axis, and both patches are multiples of what the network's strides divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf, prod
from typing import Any

Size = tuple[int, ...]
MIN_STAGES = 3


def divisors(strides: Sequence[int | Sequence[int]], dim: int) -> Size:
    """What each axis of a patch must be a multiple of: the product of the strides.

    Raises:
        ValueError: fewer than three stages, the smallest U-Net that has a head on its second level.
    """
    if len(strides) < MIN_STAGES:
        raise ValueError(
            f"meU-net trains the head of the second level, so it needs plans with at least {MIN_STAGES} stages, got "
            f"{len(strides)}: plan a larger patch, or use the default trainer."
        )
    per_axis = [[stride] * dim if isinstance(stride, int) else list(stride) for stride in strides]
    return tuple(prod(axis) for axis in zip(*per_axis, strict=True))


def factors(k: Any, dim: int) -> tuple[float, ...]:
    """`k` for each axis.

    Args:
        k: One number, or one per axis.
        dim: Number of axes.

    Raises:
        ValueError: not one number or one per axis; below 1, infinite or not a number.
    """
    values = [k] * dim if isinstance(k, (int, float)) else k
    numbers = isinstance(values, Sequence) and all(isinstance(value, (int, float)) for value in values)
    if not numbers or len(values) != dim:
        raise ValueError(f"k of meU-net needs one number or {dim} of them, one per axis of the patch, got {k!r}.")
    if not all(1 <= value < inf for value in values):
        raise ValueError(
            f"k of meU-net is the size of the expanded patch over that of the standard patch and must be at least 1, "
            f"got {k!r}: use 1.5, or 1 for an axis that is not expanded."
        )
    return tuple(float(value) for value in values)


def standard_patch(patch: Sequence[int], k: Any, divisor: Sequence[int]) -> Size:
    """P for an expanded patch: kP / k per axis, rounded to the nearest multiple of the divisor.

    Args:
        patch: KP, the patch of the plans.
        k: One number, or one per axis.
        divisor: Divisor of each axis, see `divisors`.

    Raises:
        ValueError: kP is not divisible; P falls under the divisor, or leaves one voxel on the coarsest level.
    """
    ks = factors(k, len(patch))
    if any(size % d for size, d in zip(patch, divisor, strict=True)):
        raise ValueError(
            f"Every axis of meU-net's patch must be divisible by the product of the strides, {list(divisor)}, got the "
            f"patch {list(patch)}: round its axes up."
        )
    exact = [size / factor for size, factor in zip(patch, ks, strict=True)]
    if any(size < (1 - 1e-6) * d for size, d in zip(exact, divisor, strict=True)):
        raise ValueError(
            f"The standard patch of meU-net, the plans' patch {list(patch)} over k = {k}, is smaller than the product "
            f"of the strides, {list(divisor)}: use a smaller k or a larger patch."
        )
    steps = [round(size / d) for size, d in zip(exact, divisor, strict=True)]
    if prod(steps) == 1:
        raise ValueError(
            f"The standard patch of meU-net, the plans' patch {list(patch)} over k = {k}, leaves a single voxel on the "
            f"coarsest level (strides {list(divisor)}), which can't be normalised: use a smaller k or a larger patch."
        )
    return tuple(step * d for step, d in zip(steps, divisor, strict=True))


def expanded_patch(standard: Sequence[int], k: Any, divisor: Sequence[int], image: Sequence[float]) -> Size:
    """KP for a standard patch: k P per axis, at most the image, rounded to a multiple of the divisor.

    An axis on which P already covers the image is not expanded.

    Args:
        standard: Standard patch, P.
        k: One number, or one per axis.
        divisor: Divisor of each axis, see `divisors`.
        image: Size of a typical image in voxels.
    """
    ks = factors(k, len(standard))
    wanted = [round(size * factor / d) * d for size, factor, d in zip(standard, ks, divisor, strict=True)]
    largest = [max(p, ceil(size / d) * d) for p, size, d in zip(standard, image, divisor, strict=True)]
    return tuple(min(a, b) for a, b in zip(wanted, largest, strict=True))
