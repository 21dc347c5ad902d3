"""Distances of gradients, on numbers that one can compute in one's head."""

from __future__ import annotations

import math

import pytest
import torch

from nnunet_ext.doctor.gradients.compare import Difference, distances, in_double, in_mixed

ONES = torch.ones(4, dtype=torch.float64)


def test_distance_is_relative_to_what_is_wanted() -> None:
    assert distances([ONES / 2], [ONES], 0.0) == [0.5]
    assert distances([3 * ONES], [2 * ONES], 0.0) == [0.5]


def test_gradient_that_is_tiny_beside_the_others_is_compared_with_their_mean() -> None:
    tiny, other = 1e-12 * ONES, ONES
    (found, _) = distances([2 * tiny, other], [tiny, other], 0.1)
    assert found == pytest.approx(1e-12 * 2 / (0.1 * math.sqrt(0.5) * 2))


@pytest.mark.parametrize("found", [None, ONES * math.nan, ONES * math.inf])
def test_gradient_that_is_missing_or_no_number_is_infinitely_off(found: torch.Tensor | None) -> None:
    assert distances([found], [ONES], 0.1) == [math.inf]
    assert in_double(["w"], [found], [ONES]).is_wrong


def test_gradient_that_should_not_be_there_is_infinitely_off() -> None:
    assert distances([ONES, None], [None, None], 0.1) == [math.inf, 0.0]


def test_no_gradient_is_as_good_as_zeros() -> None:
    zeros = 0 * ONES
    assert distances([None, zeros, ONES], [zeros, None, ONES], 0.1) == [0.0, 0.0, 0.0]


def test_the_furthest_is_named() -> None:
    found = in_double(["a", "b", "c"], [ONES, ONES * (1 + 1e-6), ONES], [ONES, ONES, ONES])
    assert found.name == "b"
    assert found.is_wrong
    assert not in_double(["a"], [ONES * (1 + 1e-12)], [ONES]).is_wrong


def test_noise_of_low_precision_is_allowed_and_a_lost_half_is_not() -> None:
    precise, plain = ONES, ONES * 1.02
    assert not in_mixed(["w"], [ONES * 0.97], [plain], [precise]).is_wrong
    assert in_mixed(["w"], [plain / 2], [plain], [precise]).is_wrong


def test_limit_itself_is_right_and_nan_is_wrong() -> None:
    assert not Difference(name="w", value=1.0, limit=1.0).is_wrong
    assert Difference(name="w", value=math.nan, limit=1.0).is_wrong
