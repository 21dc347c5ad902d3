"""Scores of several runs over the same cases: means, paired differences, ranks, worst cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nnunet_ext.comparison.scores import by_structure, case_means, common_cases
from nnunet_ext.comparison.statistics import PairedDifference, difference, holm, rank_frequencies
from nnunet_ext.errors import UsageError
from nnunet_ext.printable import counted

MEAN = None  # in the place of a structure's name: the mean of all; any name may be a structure's
Structure = str | None
WORST = 5
LESS_IS_BETTER = ("HD95",)


@dataclass(frozen=True, kw_only=True)
class MeanScore:
    """Mean of one metric and structure over the common cases of one run.

    Args:
        n: Cases with a value.
        missed: Cases in which the reference has the structure and the run finds none of it.
        invented: Cases in which the run finds the structure and the reference has none.
    """

    run: str
    metric: str
    structure: Structure
    mean: float
    standard_deviation: float
    n: int
    missed: int
    invented: int


@dataclass(frozen=True, kw_only=True)
class Comparand:
    """A run's difference to a baseline in one metric and structure.

    Args:
        p_holm: `difference.p` after Holm's correction over its family: all runs for the mean over structures (the
            primary outcome), all runs and structures together for the single structures; each metric and baseline,
            and the second baseline, apart.
    """

    run: str
    baseline: str
    metric: str
    structure: Structure
    difference: PairedDifference
    p_holm: float

    @property
    def pair(self) -> tuple[str, str]:
        """Run and baseline."""
        return self.run, self.baseline


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy of all runs over one set of cases.

    Args:
        name: "cross-validation" or "held-out".
        scores: All rows; `compared` tells whether the case is one that all runs have.
        labels: Labels of the runs, the baseline first.
        second: Label of the run that the others are compared with in their means too; None without one.
        structures: Names, in the order of dataset.json.
        metrics: "Dice", "IoU" and, where surfaces were measured, "NSD", "HD95".
        cases: Names of the common cases.
        means, comparands: One for each run, metric and structure (`MEAN` included).
        ranks: (run, rank) number of cases, by mean Dice.
        worst: Run -> its cases of the lowest mean Dice, lowest first.
    """

    name: str
    scores: pd.DataFrame
    labels: tuple[str, ...]
    second: str | None
    structures: tuple[str, ...]
    metrics: tuple[str, ...]
    cases: tuple[str, ...]
    means: tuple[MeanScore, ...]
    comparands: tuple[Comparand, ...]
    ranks: pd.DataFrame
    worst: dict[str, list[tuple[str, float]]]

    @property
    def compared(self) -> pd.DataFrame:
        """Rows of the common cases."""
        return self.scores[self.scores["compared"]]

    def name_of(self, structure: Structure) -> str:
        """A structure's name; of `MEAN` one that no structure has."""
        if structure is not MEAN:
            return structure
        name = "mean"
        while name in self.structures:
            name += " of structures"
        return name

    def values(self, metric: str, structure: Structure) -> pd.DataFrame:
        """Values of the common cases, (case, run)."""
        return _values(self.compared, metric, structure)[list(self.labels)]

    def mean(self, run: str, metric: str = "Dice", structure: Structure = MEAN) -> MeanScore:
        """The mean of these."""
        return next(m for m in self.means if (m.run, m.metric, m.structure) == (run, metric, structure))

    def comparand(
        self, run: str, metric: str = "Dice", structure: Structure = MEAN, baseline: str | None = None
    ) -> Comparand:
        """The difference of these; `baseline` is the first, where none is given."""
        wanted = (run, baseline or self.labels[0], metric, structure)
        return next(c for c in self.comparands if (c.run, c.baseline, c.metric, c.structure) == wanted)

    @property
    def baselines(self) -> tuple[str, ...]:
        """The baseline and the second one, where there is one."""
        return (self.labels[0], *([self.second] if self.second else []))

    def finds(self, run: str, structure: str) -> bool:
        """Whether a run finds anything of a structure in any case."""
        return bool((self.values("Dice", structure)[run] > 0).any())

    def present(self, structure: str) -> int:
        """Number of cases whose reference has a structure, or in which some run finds it."""
        return len(self.values("Dice", structure).dropna(how="all"))


def evaluate(name: str, scores: pd.DataFrame, labels: Sequence[str], second: str | None = None) -> Evaluation:
    """Compare runs over the cases that all of them have.

    Args:
        name: Name of the set of cases.
        scores: One row per run, case and structure.
        labels: Labels of the runs, the baseline first.
        second: Label of the second baseline.

    Raises:
        UsageError: no case is in all runs.
    """
    cases = common_cases(scores)
    if not cases:
        counts = "; ".join(
            f"{label}: {counted(n, 'case')}" for label, n in scores.groupby("run")["case"].nunique().items()
        )
        raise UsageError(
            f"the runs must have cases of {name} in common, they have none ({counts}): compare the same folds (-f)."
        )
    scores = scores.assign(compared=scores["case"].isin(cases))
    kept = scores[scores["compared"]]
    structures = tuple(dict.fromkeys(kept["structure"]))
    metrics = tuple(metric for metric in ("Dice", "IoU", "NSD", "HD95") if metric in kept)
    dice = _values(kept, "Dice", MEAN)[list(labels)]
    return Evaluation(
        name=name,
        scores=scores,
        labels=tuple(labels),
        second=second,
        structures=structures,
        metrics=metrics,
        cases=tuple(cases),
        means=tuple(_means(kept, labels, metrics, structures)),
        comparands=tuple(_comparands(kept, labels, second, metrics, structures)),
        ranks=rank_frequencies(dice),
        worst={label: _worst(dice[label]) for label in labels},
    )


def _values(scores: pd.DataFrame, metric: str, structure: Structure) -> pd.DataFrame:
    return case_means(scores, metric) if structure is MEAN else by_structure(scores, structure, metric)


def _means(
    kept: pd.DataFrame, labels: Sequence[str], metrics: Sequence[str], structures: Sequence[str]
) -> list[MeanScore]:
    found = []
    for label in labels:
        own = kept[kept["run"] == label]
        for metric in metrics:
            single = [_mean(own[own["structure"] == s], label, metric, s) for s in structures]
            cases = own.groupby("case")[metric].mean()
            overall: dict[str, Any] = {
                # nnU-Net's foreground mean: of the structures' means
                "mean": pd.Series([m.mean for m in single]).mean(),
                "standard_deviation": cases.std(ddof=1),
                "n": int(cases.count()),
                "missed": sum(m.missed for m in single),
                "invented": sum(m.invented for m in single),
            }
            found += [MeanScore(run=label, metric=metric, structure=MEAN, **overall), *single]
    return found


def _mean(rows: pd.DataFrame, label: str, metric: str, structure: str) -> MeanScore:
    reference, found = rows["TP"] + rows["FN"] > 0, rows["TP"] + rows["FP"] > 0
    values = rows[metric]
    return MeanScore(
        run=label,
        metric=metric,
        structure=structure,
        mean=float(values.mean()),
        standard_deviation=float(values.std(ddof=1)),
        n=int(values.count()),
        missed=int((reference & ~found).sum()),
        invented=int((found & ~reference).sum()),
    )


def _comparands(
    kept: pd.DataFrame, labels: Sequence[str], second: str | None, metrics: Sequence[str], structures: Sequence[str]
) -> Iterator[Comparand]:
    baseline, *others = labels
    rest = [label for label in others if label != second]
    families: list[tuple[str, Sequence[str], tuple[Structure, ...]]] = [
        (baseline, rest, (MEAN,)),
        (baseline, rest, tuple(structures)),
    ]
    if second:  # which may have come by itself: it changes no p-value of the others
        families += [(baseline, [second], (MEAN,)), (baseline, [second], tuple(structures)), (second, rest, (MEAN,))]
    for metric in metrics:
        for against, runs, family in families:
            tables = {structure: _values(kept, metric, structure) for structure in family}
            pairs = [(run, structure) for structure in family for run in runs]
            differences = [difference(tables[s][run], tables[s][against]) for run, s in pairs]
            adjusted = holm([d.p for d in differences])
            for (run, structure), d, p in zip(pairs, differences, adjusted, strict=True):
                yield Comparand(run=run, baseline=against, metric=metric, structure=structure, difference=d, p_holm=p)


def _worst(dice: pd.Series[float]) -> list[tuple[str, float]]:
    lowest = dice.dropna().sort_index().sort_values(kind="stable").head(WORST)
    return [(str(case), float(value)) for case, value in lowest.items()]
