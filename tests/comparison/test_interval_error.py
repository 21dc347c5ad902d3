"""How often the interval of a paired difference misses the true mean, beside the percentile bootstrap's.

The distributions are such as differences of Dice have: of one spread, with heavy tails, half zero, skewed. The table
in docs/how-to/compare.md holds what this measures.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from nnunet_ext.comparison.statistics import FEWEST_CASES, difference, interval, verdict
from tests.comparison.test_statistics import series

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Array]
REPEATS = 4000
DISTRIBUTIONS: dict[str, Draw] = {  # all of mean zero
    "normal": lambda random, size: random.standard_normal(size),
    "heavy tails": lambda random, size: random.standard_t(3, size),
    "half zero": lambda random, size: np.where(random.random(size) < 0.5, 0.0, random.standard_normal(size)),
    "skewed": lambda random, size: random.exponential(1.0, size) - 1,
    "very skewed": lambda random, size: random.lognormal(0.0, 1.0, size) - np.exp(0.5),
}


def draws(name: str, n: int) -> Array:
    return DISTRIBUTIONS[name](np.random.default_rng(n), (REPEATS, n))


def misses(d: Array) -> float:
    """Share of the samples, (repeats, n), whose interval lies beside the true mean."""
    bounds = np.array([interval(sample) for sample in d])
    return float(np.mean((bounds[:, 0] > 0) | (bounds[:, 1] < 0)))


def misses_of_bootstrap(d: Array) -> float:
    """The same of the percentile bootstrap."""
    random = np.random.default_rng(0)
    chosen = random.integers(0, d.shape[1], (400, d.shape[1]))
    low, high = np.quantile(d[:1000][:, chosen].mean(axis=2), (0.025, 0.975), axis=1)  # (repeats, resamples, n)
    return float(np.mean((low > 0) | (high < 0)))


@pytest.mark.parametrize("n", [2, 3, 5, 10, 20, 40])
@pytest.mark.parametrize("name", ["normal", "heavy tails", "half zero"])
def test_symmetric_differences_are_missed_in_a_twentieth_whatever_their_number(name: str, n: int) -> None:
    assert misses(draws(name, n)) < 0.06


@pytest.mark.parametrize(("name", "n", "most"), [("skewed", 10, 0.11), ("skewed", 40, 0.08), ("very skewed", 10, 0.17)])
def test_skewed_differences_are_missed_more_often_and_less_than_by_the_bootstrap(
    name: str, n: int, most: float
) -> None:
    d = draws(name, n)
    assert 0.05 < misses(d) < most
    assert misses(d) < misses_of_bootstrap(d)


def test_the_bootstrap_of_two_cases_misses_every_second_time() -> None:
    d = draws("normal", 2)
    assert misses_of_bootstrap(d) > 0.45
    assert misses(d) < 0.06


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_equal_runs_are_called_superior_in_a_fortieth_of_the_smallest_comparisons(name: str) -> None:
    words = []
    for sample in draws(name, FEWEST_CASES):
        if interval(sample)[0] > 0:  # nothing else is called superior, and the rank test of all of them takes minutes
            found = difference(series(*sample), series(*np.zeros(FEWEST_CASES)))
            words.append(verdict(found, found.p, 0.0).word)
    assert words.count("superior") < 0.035 * REPEATS
