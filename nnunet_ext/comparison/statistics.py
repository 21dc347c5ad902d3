"""Paired statistics of two runs over the same cases.

The difference is run minus baseline. Its interval is the percentile bootstrap over cases (9999 resamples, fixed
seed), its p-value that of Wilcoxon's signed-rank test (two-sided, zero differences discarded). Verdicts compare the
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

RESAMPLES = 9999
SEED = 0
CONFIDENCE = 0.95
Verdict = Literal["superior", "non-inferior", "inferior", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean difference of a run to the baseline over the cases that both have a value for.

    Args:
        n: Number of such cases.
        mean: Mean of run minus baseline; NaN without cases.
        low, high: 95 % interval of `mean`; NaN with fewer than two cases.
        p: Wilcoxon signed-rank, two-sided; NaN with fewer than two cases, 1 where all differences are zero.
        better, worse: Number of cases with a positive, a negative difference.
    """

    n: int
    mean: float
    low: float
    high: float
    p: float
    better: int
    worse: int


def difference(run: pd.Series[float], baseline: pd.Series[float]) -> PairedDifference:
    """Compare two series of values, indexed by case; cases without a value in either don't count."""
    d = (run - baseline).dropna().sort_index().to_numpy(dtype=float)
    if len(d) < 2:
        mean = float(d.mean()) if len(d) else np.nan
        return PairedDifference(
            n=len(d), mean=mean, low=np.nan, high=np.nan, p=np.nan, better=int((d > 0).sum()), worse=int((d < 0).sum())
        )
    low, high = interval(d)
    return PairedDifference(
        n=len(d),
        mean=float(d.mean()),
        low=low,
        high=high,
        p=signed_rank(d),
        better=int((d > 0).sum()),
        worse=int((d < 0).sum()),
    )


def interval(d: NDArray[np.float64]) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `d`, (n,) with n >= 2."""
    found = stats.bootstrap(
        (d,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=1000,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def signed_rank(d: NDArray[np.float64]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test; 1 where all differences are zero."""
    if not d.any():
        return 1.0
    with warnings.catch_warnings():
        # Ties and few cases: scipy then takes the normal approximation and says so.
        warnings.simplefilter("ignore")
        return float(stats.wilcoxon(d, zero_method="wilcox", alternative="two-sided", method="auto").pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values of one family (Holm 1979); NaN stays NaN and does not count."""
    values = np.asarray(p, dtype=float)
    order = [int(i) for i in np.argsort(values, kind="stable") if not np.isnan(values[i])]
    adjusted, largest = np.full(len(values), np.nan), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * values[i]))
        adjusted[i] = largest
    return [float(value) for value in adjusted]


def verdict(found: PairedDifference, margin: float) -> Verdict:
    """Non-inferiority by the interval of a difference of which more is better.

    Args:
        found: The difference.
        margin: Largest loss that does not matter, in the unit of the difference, not negative.
    """
    if found.low > 0:
        return "superior"
    if found.low > -margin:
        return "non-inferior"
    return "inferior" if found.high < -margin else "inconclusive"


def rank_frequencies(values: pd.DataFrame) -> pd.DataFrame:
    """How often each run takes each rank, (run, rank); equal values share the better rank.

    Args:
        values: (case, run), more is better; cases without a value for some run don't count.
    """
    ranks = values.dropna().rank(axis="columns", method="min", ascending=False).astype(int)
    places = range(1, values.shape[1] + 1)
    return pd.DataFrame({place: (ranks == place).sum() for place in places}, index=values.columns)
