"""Patches that may be planned for an image: shapes that nnU-Net's heuristic passes through, and their neighbours.

nnU-Net starts from a patch of equal size in mm per axis, of about 256^3 or 2048^2 voxels, clipped to the image, and
shortens the axis that covers the largest share of the image. Steps of its divisors change the volume by up to a
quarter, so every axis may also take one of the next sizes; beyond the first patch it grows up to the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import ceil, floor, log2, prod

Size = tuple[int, ...]
FIRST_VOLUME = {2: 2048.0**2, 3: 256.0**3}  # as in nnU-Net
STEP = 0.97  # between two shapes on the way, per axis
SMALLEST_EDGE = 8  # voxels
MOST_DISTORTED = 1.5  # largest over smallest share that two axes have of the ideal shape


def image_size(image: Sequence[float]) -> Size:
    """Voxels of a typical image."""
    return tuple(max(1, ceil(n)) for n in image)


def patch_shapes(spacing: Sequence[float], image: Sequence[float]) -> dict[Size, float]:
    """Shapes, not yet padded to what a network's strides divide, with their distortion, 1 for the best proportions.

    Args:
        spacing: Spacing per axis in mm, or any unit.
        image: Size of a typical image in voxels.
    """
    whole = image_size(image)
    found = {whole: 1.0}
    for ideal in _way(spacing, whole):
        for shape in product(*map(_sizes_near, ideal)):
            clipped = tuple(map(min, shape, whole))
            distortion = _distortion(clipped, ideal)
            if distortion <= MOST_DISTORTED:
                found[clipped] = min(distortion, found.get(clipped, distortion))
    return found


def _distortion(shape: Size, ideal: Sequence[float]) -> float:
    ratios = [n / wanted for n, wanted in zip(shape, ideal, strict=True)]
    return max(ratios) / min(ratios)


def _way(spacing: Sequence[float], whole: Size) -> Iterator[tuple[float, ...]]:
    """Shapes in the order of size, from below to the whole image."""
    first = FIRST_VOLUME[len(whole)]
    share = 1.0
    start = shape = _equal_in_mm(spacing, whole, first)
    while max(shape) > SMALLEST_EDGE:
        yield shape
        share *= STEP
        shape = _shortened(start, whole, share)
    volume = first
    while (shape := _equal_in_mm(spacing, whole, volume)) != whole:
        yield shape
        volume /= STEP ** len(whole)
    yield tuple(float(n) for n in whole)


def _equal_in_mm(spacing: Sequence[float], whole: Size, volume: float) -> tuple[float, ...]:
    edge = (volume * prod(spacing)) ** (1 / len(whole))
    return tuple(min(edge / s, w) for s, w in zip(spacing, whole, strict=True))


def _shortened(start: Sequence[float], whole: Size, share: float) -> tuple[float, ...]:
    """No axis covers more than `share` of the image."""
    return tuple(max(min(n, share * w), min(n, SMALLEST_EDGE)) for n, w in zip(start, whole, strict=True))


def _sizes_near(n: float) -> set[int]:
    """Two smaller and two larger sizes: multiples of the power of two that leaves 4 to 8 voxels when pooled away."""
    below = _rounded(n, floor)
    above = _rounded(n, ceil)
    return {_rounded(below - 1, floor), below, above, _rounded(above + 1, ceil)}


def _rounded(n: float, towards: Callable[[float], int]) -> int:
    step = 2 ** max(0, int(log2(max(n, 4) / 4)))
    return max(1, towards(n / step) * step)
