"""Patches that may be planned: inside the image, in nnU-Net's proportions."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest

from nnunet_ext.plans.patch_shapes import MOST_DISTORTED, patch_shapes

IMAGES = {
    "isotropic": ((1.0, 1.0, 1.0), (400.0, 400.0, 400.0)),
    "thick slices": ((5.0, 0.8, 0.8), (40.0, 512.0, 512.0)),
    "rod": ((1.0, 1.0, 1.0), (1072.0, 140.0, 140.0)),
    "one axis tiny": ((1.0, 1.0, 1.0), (3.0, 256.0, 256.0)),
    "2d": ((0.5, 0.5), (1000.5, 700.0)),
    "tiny": ((1.0, 1.0, 1.0), (9.5, 10.0, 8.0)),
}


@pytest.mark.parametrize("image", IMAGES)
def test_shapes_lie_in_the_image_and_reach_from_small_to_all_of_it(image: str) -> None:
    spacing, size = IMAGES[image]
    shapes = patch_shapes(spacing, size)
    whole = tuple(-int(-n // 1) for n in size)
    assert whole in shapes
    assert all(1 <= n <= w for shape in shapes for n, w in zip(shape, whole, strict=True))
    assert min(map(prod, shapes)) <= prod(min(n, 12) for n in whole)
    assert all(1 <= distortion <= MOST_DISTORTED for distortion in shapes.values())


def test_steps_between_volumes_are_at_most_a_fifth() -> None:
    volumes = sorted(prod(shape) for shape in patch_shapes((1.0, 1.0, 1.0), (400.0, 400.0, 400.0)))
    assert max(b / a for a, b in pairwise(volumes) if a > 32**3) <= 1.2


def test_cubes_of_isotropic_images_are_not_distorted() -> None:
    shapes = patch_shapes((1.0, 1.0, 1.0), (400.0, 400.0, 400.0))
    assert shapes[128, 128, 128] == 1.0 < shapes[128, 128, 160]


def test_a_long_image_gets_a_long_patch_as_in_nnunet() -> None:
    shapes = patch_shapes((1.0, 1.0, 1.0), (1072.0, 140.0, 140.0))
    assert (256, 64, 64) in shapes
    assert (64, 128, 128) not in shapes
