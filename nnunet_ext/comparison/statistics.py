"""Paired statistics of two runs over the same cases.

The difference is run minus baseline. Its interval is Student's, of the mean of the paired differences: the percentile
bootstrap, which other reports show, is far too narrow for few cases (tests/comparison/test_interval_error.py measures
both). Its p-value is that of Wilcoxon's signed-rank test (two-sided, zero differences discarded). Verdicts compare the
interval with a margin that was chosen beforehand: non-inferior where the whole interval lies above minus the margin.
Cases of one fold share a model, so that intervals are slightly too narrow for the question "would another training
give the same".
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
SIGNIFICANT = 1 - CONFIDENCE
# Below, a rank test of a few cases can't confirm an interval, and the interval's own error is large where a single case
# decides.
FEWEST_CASES = 10
_EXACT = 13  # cases up to which scipy's test is exact with ties too, but takes seconds: here by all sign patterns
NONE = "\N{EN DASH}"
Word = Literal["superior", "non-inferior", "inferior", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean difference of a run to the baseline over the cases that both have a value for.

    Args:
        n: Number of such cases.
        mean: Mean of run minus baseline; NaN without cases.
        low, high: 95 % interval of `mean`; NaN with fewer than two cases.
        p: Wilcoxon signed-rank, two-sided; NaN with fewer than two cases, 1 where all differences are zero.
        better, worse: Number of cases with a positive, a negative difference.
        direction: Sign of the sum of the signed ranks, on whose side the test sees the run.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float
    better: int
    worse: int
    direction: int


def difference(run: pd.Series[float], baseline: pd.Series[float]) -> PairedDifference:
    """Compare two series of values, indexed by case; cases without a value in either don't count."""
    d = (run - baseline).dropna().sort_index().to_numpy(dtype=float)
    low, high = interval(d) if len(d) > 1 else (np.nan, np.nan)
    return PairedDifference(
        n=len(d),
        mean=float(d.mean()) if len(d) else np.nan,
        low=low,
        high=high,
        p=signed_rank(d) if len(d) > 1 else np.nan,
        better=int((d > 0).sum()),
        worse=int((d < 0).sum()),
        direction=int(np.sign(_signed_ranks(d).sum())),
    )


def interval(d: NDArray[np.float64]) -> tuple[float, float]:
    """Student's interval of the mean of `d`, (n,) with n >= 2."""
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
    return float(d.mean() - half), float(d.mean() + half)


def signed_rank(d: NDArray[np.float64]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test; 1 where all differences are zero."""
    d = d[d != 0]
    if d.size < 2:
        return 1.0
    if d.size <= _EXACT:
        options = {"permutation_type": "samples", "vectorized": True, "n_resamples": np.inf}
        return float(stats.permutation_test((_signed_ranks(d),), np.sum, **options).pvalue)
    with warnings.catch_warnings():
        # Where it takes the normal approximation, scipy says so.
        warnings.simplefilter("ignore")
        return float(stats.wilcoxon(d).pvalue)


def _signed_ranks(d: NDArray[np.float64]) -> NDArray[np.float64]:
    d = d[d != 0]
    return np.sign(d) * stats.rankdata(np.abs(d))


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values of one family (Holm 1979); NaN stays NaN and does not count."""
    values = np.asarray(p, dtype=float)
    order = [int(i) for i in np.argsort(values, kind="stable") if not np.isnan(values[i])]
    adjusted, largest = np.full(len(values), np.nan), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * values[i]))
        adjusted[i] = largest
    return [float(value) for value in adjusted]


@dataclass(frozen=True)
class Verdict:
    """What may be said of a difference of which more is better.

    Args:
        word: None where nothing may be said.
        note: Why not; or how interval and p-value go together where they seem to contradict each other.
    """

    word: Word | None
    note: str = ""

    def __str__(self) -> str:
        return f"{self.word or NONE} ({self.note})" if self.note else self.word or NONE


def verdict(found: PairedDifference, p: float, margin: float) -> Verdict:
    """Non-inferiority by the interval of a difference; superior only where the rank test confirms it.

    Args:
        found: The difference.
        p: Its p-value, corrected for the family that it belongs to.
        margin: Largest loss that does not matter, in the unit of the difference, not negative.
    """
    if found.n < FEWEST_CASES:
        return Verdict(None, f"{found.n} of the {FEWEST_CASES} cases that it takes")
    significant = p < SIGNIFICANT
    if significant and found.direction * found.mean < 0 and not found.low <= 0 <= found.high:
        return Verdict("inconclusive", f"{'more' if found.mean > 0 else 'less'}, but the rank test sees the opposite")
    if found.low > 0:
        return Verdict("superior") if significant else Verdict("non-inferior", "more, which the rank test leaves open")
    if found.high < -margin:
        return Verdict("inferior", "" if significant else "which the rank test leaves open")
    word: Word = "non-inferior" if found.low > -margin else "inconclusive"
    if found.high < 0:
        less = "less, by less than the margin" if word == "non-inferior" else "less, by an open amount"
        return Verdict(word, less if significant else f"{less}, which the rank test leaves open")
    return Verdict(word, "though the rank test sees a difference" if significant else "")


def rank_frequencies(values: pd.DataFrame) -> pd.DataFrame:
    """How often each run takes each rank, (run, rank); equal values share the better rank.

    Args:
        values: (case, run), more is better; cases without a value for some run don't count.
    """
    ranks = values.dropna().rank(axis="columns", method="min", ascending=False).astype(int)
    places = range(1, values.shape[1] + 1)
    return pd.DataFrame({place: (ranks == place).sum() for place in places}, index=values.columns)
