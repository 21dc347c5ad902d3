"""Sizes of meU-net's patches, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nnunet_ext.architectures.expanded.patch import divisors, expanded_patch, standard_patch


@pytest.mark.parametrize(
    ("patch", "k", "divisor", "expected"),
    [
        ((192, 192, 192), 1.5, (32, 32, 32), (128, 128, 128)),
        ((40, 56, 40), 1.5, (8, 8, 8), (24, 40, 24)),
        ((280, 280, 280), 1.75, (8, 8, 8), (160, 160, 160)),
        ((20, 320, 256), 1.5, (4, 32, 32), (12, 224, 160)),
        ((20, 320, 256), [1, 1.5, 1.5], (4, 32, 32), (20, 224, 160)),
        ((512, 512), 2, (128, 128), (256, 256)),
        ((32, 32), 1, (8, 8), (32, 32)),
    ],
)
def test_standard_patch_is_the_nearest_multiple_of_the_divisor(patch: Any, k: Any, divisor: Any, expected: Any) -> None:
    assert standard_patch(patch, k, divisor) == expected


@pytest.mark.parametrize("k", [1.0, 1.25, 1.5, 1.75, 2.0])
@pytest.mark.parametrize("image", [(1072, 470, 470), (100, 512, 512), (36, 50, 35), (150, 90, 1000)])
def test_expanded_patch_divides_holds_p_and_stays_in_the_image(k: float, image: tuple[int, ...]) -> None:
    standard, divisor = (64, 96, 128), (16, 32, 32)
    patch = expanded_patch(standard, k, divisor, image)
    for size, p, d, voxels in zip(patch, standard, divisor, image, strict=True):
        assert size % d == 0
        assert p <= size <= max(p, math.ceil(voxels / d) * d)
        assert size <= k * p + d / 2
        assert voxels > p or size == p  # P covers the image: nothing to add
    noted = [size / p for size, p in zip(patch, standard, strict=True)]
    assert standard_patch(patch, noted, divisor) == standard


@pytest.mark.parametrize("k", [0.99, 0, -1.5, math.nan, math.inf, [1.5, 0.5, 1.5]])
def test_k_below_one_is_refused_with_the_value_and_a_cure(k: Any) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1, got .*: use 1\.5"):
        standard_patch((96, 96, 96), k, (8, 8, 8))


@pytest.mark.parametrize("k", ["1.5", None, [1.5, 1.5], [1.5, "a", 1]])
def test_k_of_the_wrong_shape_is_refused(k: Any) -> None:
    with pytest.raises(ValueError, match="one number or 3 of them"):
        standard_patch((96, 96, 96), k, (8, 8, 8))


@pytest.mark.parametrize(("patch", "k"), [((96, 96, 96), 13), ((96, 96, 16), 2.1), ((96, 8, 96), [1, 1.01, 1])])
def test_standard_patch_under_the_divisor_is_refused(patch: Any, k: Any) -> None:
    with pytest.raises(ValueError, match=r"smaller than the product of the strides, \[8, 8, 8\]: use a smaller k"):
        standard_patch(patch, k, (8, 8, 8))


def test_a_standard_patch_of_one_coarsest_voxel_is_refused() -> None:
    with pytest.raises(ValueError, match="single voxel on the coarsest level"):
        standard_patch((16, 16), 2, (8, 8))


def test_an_axis_that_is_not_divisible_is_refused() -> None:
    with pytest.raises(ValueError, match=r"divisible by .*\[8, 8, 8\], got the patch \[96, 97, 96\]"):
        standard_patch((96, 97, 96), 1.5, (8, 8, 8))


@pytest.mark.parametrize("n", [1, 2])
def test_plans_without_a_head_on_the_second_level_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"at least 3 stages, got {n}: plan a larger patch"):
        divisors([[1, 1, 1], [2, 2, 2]][:n], 3)


def test_divisor_is_the_product_of_the_strides_of_each_axis() -> None:
    assert divisors([[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]], 3) == (2, 8, 8)
    assert divisors([1, 2, 2], 2) == (4, 4)
