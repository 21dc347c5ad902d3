"""Statistics against hand-computed values and independent computations."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nnunet_ext.comparison.statistics import (
    PairedDifference,
    difference,
    holm,
    interval,
    rank_frequencies,
    signed_rank,
    verdict,
)


def series(*values: float) -> pd.Series:
    return pd.Series(values, index=[f"case_{i}" for i in range(len(values))], dtype=float)


def exact_signed_rank(d: np.ndarray) -> float:
    """Two-sided p by going through all sign patterns; no ties, no zeros."""
    ranks = np.argsort(np.argsort(np.abs(d))) + 1
    observed = min(ranks[d > 0].sum(), ranks[d < 0].sum())
    sums = [
        sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in itertools.product((0, 1), repeat=len(d))
    ]
    return min(1.0, 2 * np.mean([value <= observed for value in sums]))


def test_mean_difference_is_run_minus_baseline_over_cases_with_both_values() -> None:
    found = difference(series(0.9, 0.8, np.nan, 0.5), series(0.7, 0.8, 0.6, np.nan))
    assert (found.n, found.better, found.worse) == (2, 1, 0)
    assert found.mean == pytest.approx(0.1)


def test_cases_are_paired_by_name_not_by_position() -> None:
    baseline = series(0.1, 0.5, 0.9)
    assert difference(baseline[::-1], baseline).mean == 0.0


def test_fewer_than_two_cases_have_no_interval_and_no_p() -> None:
    one, none = difference(series(0.9), series(0.7)), difference(series(np.nan), series(0.7))
    assert one.mean == pytest.approx(0.2)
    assert np.isnan([one.low, one.high, one.p, none.mean]).all()
    assert verdict(one, one.p, 0.01).word is None


def test_equal_runs_have_no_difference_and_p_of_one() -> None:
    same = difference(series(0.9, 0.8, 0.7), series(0.9, 0.8, 0.7))
    assert (same.mean, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_p_value_is_that_of_all_sign_patterns(seed: int) -> None:
    d = np.random.default_rng(seed).normal(0.3, 1, 10)
    assert signed_rank(d) == pytest.approx(exact_signed_rank(d), rel=1e-12)


@pytest.mark.parametrize("d", [(1, 1, 1, -1, 2, 2), (3, -3, 3, 3, 3, 3, 3, -1), (0, 0, 1, 2, -2)])
def test_p_value_of_ties_is_that_of_scipy(d: tuple[int, ...]) -> None:
    kept = np.array([x for x in d if x], dtype=float)
    assert signed_rank(np.array(d, dtype=float)) == pytest.approx(stats.wilcoxon(kept, method="auto").pvalue)


def test_zero_differences_are_discarded() -> None:
    d = np.random.default_rng(0).normal(0.3, 1, 60)
    padded = np.concatenate([d, np.zeros(7)])
    assert signed_rank(padded) == pytest.approx(stats.wilcoxon(d, method="approx").pvalue)


@pytest.mark.parametrize("n", [2, 12, 50])
def test_interval_is_that_of_the_paired_t_test(n: int) -> None:
    d = np.random.default_rng(1).gamma(2, 0.02, n)
    expected = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert interval(d) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_holm_follows_the_worked_example() -> None:
    # m = 4, sorted 0.005, 0.01, 0.03, 0.04 -> 0.02, 0.03, 0.06, 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_never_exceeds_one_and_leaves_out_what_is_not_defined() -> None:
    adjusted = holm([0.7, np.nan, 0.4])
    assert adjusted[0] == pytest.approx(0.8)
    assert adjusted[2] == pytest.approx(0.8)
    assert np.isnan(adjusted[1])
    assert holm([0.9, 0.9, 0.9]) == [1.0, 1.0, 1.0]
    assert holm([]) == []


def found(low: float, high: float, n: int = 10) -> PairedDifference:
    mean = (low + high) / 2
    direction = int(np.sign(mean))
    return PairedDifference(n=n, mean=mean, low=low, high=high, p=0.5, better=5, worse=5, direction=direction)


@pytest.mark.parametrize("sign", [1, -1])
def test_mean_that_the_rank_test_contradicts_is_inconclusive(sign: int) -> None:
    d = sign * np.concatenate([np.full(15, 0.35), np.linspace(-0.03, -0.02, 65)])
    judged = difference(series(*d), series(*np.zeros(80)))
    assert judged.low * judged.high > 0
    assert judged.p < 0.05
    assert verdict(judged, judged.p, 0.01).word == "inconclusive"
    assert "the rank test sees the opposite" in verdict(judged, judged.p, 0.01).note


@pytest.mark.parametrize(
    ("low", "high", "p", "expected"),
    [
        (0.001, 0.02, 0.01, "superior"),
        (0.001, 0.02, 0.06, "non-inferior (more, which the rank test leaves open)"),
        (-0.009, 0.02, 0.5, "non-inferior"),
        (-0.009, 0.02, 0.01, "non-inferior (though the rank test sees a difference)"),
        (-0.009, -0.001, 0.01, "non-inferior (less, by less than the margin)"),
        (-0.011, 0.02, 0.5, "inconclusive"),
        (-0.011, 0.02, 0.01, "inconclusive (though the rank test sees a difference)"),
        (-0.03, -0.011, 0.01, "inferior"),
        (-0.03, -0.011, 0.06, "inferior (which the rank test leaves open)"),
        (-0.03, -0.009, 0.01, "inconclusive (less, by an open amount)"),
        (-0.009, -0.001, 0.06, "non-inferior (less, by less than the margin, which the rank test leaves open)"),
        (-0.01, 0.0, 0.5, "inconclusive"),
    ],
)
def test_verdict_compares_the_whole_interval_with_the_margin(low: float, high: float, p: float, expected: str) -> None:
    assert str(verdict(found(low, high), p, 0.01)) == expected


@pytest.mark.parametrize("p", [0.001, 0.049, 0.051, 0.9])
@pytest.mark.parametrize(("low", "high"), [*itertools.combinations((-0.03, -0.012, -0.005, 0.0, 0.004, 0.02), 2)])
def test_verdict_and_p_never_contradict_each_other_without_a_word(low: float, high: float, p: float) -> None:
    judged = verdict(found(low, high), p, 0.01)
    differs = {"superior": low > 0, "inferior": high < 0}.get(str(judged.word), False)
    assert (differs == (p < 0.05)) or judged.note


@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_few_cases_have_no_verdict(n: int) -> None:
    judged = verdict(found(0.1, 0.2, n), 0.001, 0.01)
    assert (judged.word, judged.note) == (None, f"{n} of the 10 cases that it takes")


def test_ranks_count_cases_and_ties_share_the_better_rank() -> None:
    values = pd.DataFrame({"A": [0.9, 0.5, 0.7, np.nan], "B": [0.8, 0.5, 0.9, 0.1], "C": [0.1, 0.1, 0.8, 0.2]})
    found = rank_frequencies(values)
    assert found.to_numpy().tolist() == [[2, 0, 1], [2, 1, 0], [0, 1, 2]]
    assert list(found.index) == ["A", "B", "C"]
    assert list(found.columns) == [1, 2, 3]
