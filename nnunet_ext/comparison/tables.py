"""Tables of the report, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnunet_ext.comparison.accuracy import LESS_IS_BETTER, MEAN, Comparand, Evaluation, MeanScore
from nnunet_ext.comparison.compare import Comparison
from nnunet_ext.comparison.cost import Cost, plan_differences
from nnunet_ext.comparison.statistics import NONE

MISSING = NONE
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
_GIB = 2**30


@dataclass(frozen=True)
class Table:
    """A table: the first column names the row, the others hold values.

    Args:
        caption: What it shows.
        header: One text per column.
        rows: One text per column each.
        texts: Number of leading columns that hold text; the others are right-aligned numbers.
        name: Name of its LaTeX file, without ending; empty: it has none.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1
    name: str = ""


def number(value: float | None, digits: int = 3) -> str:
    """Text of a number; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return MISSING
    return f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 2) -> str:
    """Text of a difference, with its sign."""
    return number(value) if math.isnan(value) else f"{value:+.{digits}f}".replace("-", MINUS)


def p_value(p: float) -> str:
    """Text of a p-value."""
    return MISSING if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def gate(comparison: Comparison) -> Table | None:
    """What a verdict rests on: a row per check, a column per run; None for plain folders of predictions."""
    labels = comparison.evaluations[0].labels
    if not comparison.request.runs:
        return None
    pairs = [c.pair for e in comparison.evaluations for c in e.comparands]
    rows = []
    for check in comparison.gate.checks:
        fails = any(check.failures(*pair) for pair in pairs)
        holds = "yes" if not fails else "accepted" if check.name in comparison.gate.accepted else "no"
        rows.append(
            (f"{check.name}: {check.title}", *(check.values[label] for label in labels), *([holds] if pairs else []))
        )
    header = ("check", *labels, *(["holds"] if pairs else []))
    return Table(
        "What a verdict rests on; the words before the colons are those of --accept.", header, tuple(rows), len(header)
    )


def summary(comparison: Comparison) -> Table:
    """The table of a paper: a row per run with accuracy and cost."""
    labels = comparison.evaluations[0].labels
    columns: dict[str, list[str]] = {}
    for evaluation in comparison.evaluations:
        name = "" if len(comparison.evaluations) == 1 else f", {evaluation.name}"
        for metric in evaluation.metrics:
            if metric != "IoU":
                means = (evaluation.mean(label, metric).mean for label in labels)
                columns[f"{metric}{' [mm]' if metric in LESS_IS_BETTER else ''}{name}"] = [
                    number(mean, _digits(metric)) for mean in means
                ]
        for baseline in evaluation.baselines if len(labels) > 1 else ():
            columns[f"Dice points to {baseline}{name}"] = [_points(evaluation, label, baseline) for label in labels]
    for title, (attribute, unit, digits) in _COLUMNS.items():
        values = [getattr(comparison.costs.get(label), attribute, None) for label in labels]
        if any(value is not None for value in values):
            columns[title] = [number(None if v is None else v / unit, digits) for v in values]
    rows = tuple((label, *(column[i] for column in columns.values())) for i, label in enumerate(labels))
    caption = (
        f"Means over cases{', differences with 95 % intervals' if len(labels) > 1 else ''}, and cost. Memory is of "
    )
    caption += "float16 autocast, counted unless it says measured; 1 GB is 2**30 bytes."
    return Table(caption, ("run", *columns), rows, name="summary")


# Title -> attribute of a cost, unit, digits.
_COLUMNS = {
    "weights [million]": ("parameters", 1e6, 2),
    "GMAC per patch": ("macs", 1e9, 1),
    "training [GB]": ("peak", _GIB, 2),
    "training, measured [GB]": ("measured_peak", _GIB, 2),
    "epoch [s]": ("seconds_per_epoch", 1, 1),
    "prediction [GB]": ("inference_peak", _GIB, 2),
    "prediction, measured [GB]": ("measured_inference_peak", _GIB, 2),
    "prediction of a case [s]": ("case_seconds", 1, 1),
}


def _file(evaluation: Evaluation, of: str) -> str:
    return f"{evaluation.name}-{of.lower()}"


def _digits(metric: str) -> int:
    return 2 if metric == "HD95" else 4


def _points(evaluation: Evaluation, label: str, baseline: str) -> str:
    """Mean difference of Dice, with its interval."""
    if label in (baseline, evaluation.labels[0]):
        return MISSING
    d = evaluation.comparand(label, baseline=baseline).difference
    return signed(100 * d.mean) + (f" ({signed(100 * d.low)} to {signed(100 * d.high)})" if d.n > 1 else "")


def means(evaluation: Evaluation, metric: str) -> Table:
    """Means of one metric: a row per structure, a column per run."""
    rows = []
    for structure in (*evaluation.structures, MEAN):
        found = [evaluation.mean(label, metric, structure) for label in evaluation.labels]
        counts = " / ".join(dict.fromkeys(str(m.n) for m in found))
        values = (f"{number(m.mean, _digits(metric))} ± {_spread(m, metric)}" for m in found)
        rows.append((evaluation.name_of(structure), counts, *values))
    caption = f"{metric}, mean ± standard deviation over cases; n: cases with a value, per run where they differ."
    return Table(caption, ("structure", "n", *evaluation.labels), tuple(rows))


def accuracy(comparison: Comparison, evaluation: Evaluation, metric: str) -> Table:
    """One metric: rows of structures and, in each, of runs; means, and differences to the baseline."""
    several, compares = len(evaluation.structures) > 1, len(evaluation.labels) > 1
    rows, judged = [], False
    for structure in (MEAN, *evaluation.structures) if several else evaluation.structures:
        for label in evaluation.labels:
            m = evaluation.mean(label, metric, structure)
            name = evaluation.name_of(structure) if label == evaluation.labels[0] else ""
            row = [name, label, str(m.n), f"{number(m.mean, _digits(metric))} ± {_spread(m, metric)}"]
            if compares and label == evaluation.labels[0]:
                row += [MISSING] * 5
            elif compares:
                c = evaluation.comparand(label, metric, structure)
                verdict = comparison.gate.judge(evaluation, c)
                judged |= verdict is not None and str(verdict) != NONE
                row += [*_difference(c, metric), str(verdict or NONE)]
            rows.append(row)
    header = ["structure", "run", "n", metric]
    header += ["difference", "95 % interval", "p (Holm)", "higher / lower", "verdict"] if compares else []
    kept = len(header) - (compares and not judged)
    return Table(
        _caption(evaluation, metric),
        tuple(header[:kept]),
        tuple(tuple(row[:kept]) for row in rows),
        2,
        _file(evaluation, metric),
    )


def _spread(mean: MeanScore, metric: str) -> str:
    return number(mean.standard_deviation, _digits(metric) - 1)


def _difference(c: Comparand, metric: str) -> tuple[str, str, str, str]:
    """Mean, interval, p and the numbers of cases above and below."""
    d, factor = c.difference, 1.0 if metric == "HD95" else 100.0
    span = f"{signed(factor * d.low)} to {signed(factor * d.high)}" if not math.isnan(d.low) else MISSING
    return signed(factor * d.mean), span, p_value(c.p_holm), f"{d.better} / {d.worse}"


def _caption(evaluation: Evaluation, metric: str) -> str:
    unit = "mm" if metric == "HD95" else "points of 0.01"
    means = f"{metric}{' in mm' if metric == 'HD95' else ''}, mean ± standard deviation over cases with a value (n)"
    if len(evaluation.labels) == 1:
        return f"{means}."
    return (
        f"{means}; difference to {evaluation.labels[0]} over the same cases in {unit}"
        f"{', less is better' if metric in LESS_IS_BETTER else ''}: mean, 95 % interval, Wilcoxon's p after Holm's "
        "correction, number of cases with a higher / lower value."
    )


def second(comparison: Comparison, evaluation: Evaluation) -> Table | None:
    """Differences of the means to the second baseline; None without one."""
    if evaluation.second is None:
        return None
    rows = []
    for metric in evaluation.metrics:
        for label in evaluation.labels:
            if metric != "IoU" and label not in evaluation.baselines:
                c = evaluation.comparand(label, metric, MEAN, evaluation.second)
                verdict = comparison.gate.judge(evaluation, c)
                rows.append((metric, label, str(c.difference.n), *_difference(c, metric), str(verdict or NONE)))
    name = _file(evaluation, "second-baseline")
    header = ("mean", "run", "n", "difference", "95 % interval", "p (Holm)", "higher / lower", "verdict")
    return (
        Table(f"Difference to {evaluation.second}, the second baseline.", header, tuple(rows), 2, name)
        if rows
        else None
    )


def absences(evaluation: Evaluation) -> Table | None:
    """Structures missed entirely or found where there are none; None without any."""
    rows = []
    for structure in evaluation.structures:
        means = [evaluation.mean(label, "Dice", structure) for label in evaluation.labels]
        if any(m.missed or m.invented for m in means):
            rows.append((structure, *(f"{m.missed} / {m.invented}" for m in means)))
    if not rows:
        return None
    caption = "Number of cases in which a run finds nothing of a structure that is there / finds one that is not there."
    return Table(caption, ("structure", *evaluation.labels), tuple(rows))


def ranks(evaluation: Evaluation) -> Table | None:
    """Rank frequencies: a row per run; None of two runs, of which the numbers of higher and lower cases say it."""
    if len(evaluation.labels) < 3:
        return None
    table = evaluation.ranks
    rows = tuple(
        (str(label), *(str(int(n)) for n in row)) for label, row in zip(table.index, table.values, strict=True)
    )
    caption = "Number of cases in which a run takes this rank by mean Dice; equal values share the better rank."
    return Table(caption, ("run", *(f"{rank}." for rank in table.columns)), rows)


def worst(evaluation: Evaluation) -> Table:
    """Worst cases of each run with the Dice that all runs have there."""
    dice = evaluation.values("Dice", MEAN)
    rows = [
        (label, case, *(number(float(dice.at[case, other]), 4) for other in evaluation.labels))
        for label in evaluation.labels
        for case, _ in evaluation.worst[label]
    ]
    caption = "Cases of the lowest mean Dice of each run, and what all runs reach there."
    return Table(caption, ("worst of", "case", *(f"Dice, {label}" for label in evaluation.labels)), tuple(rows), 2)


def runs(comparison: Comparison) -> Table | None:
    """What was compared; None for plain folders of predictions."""
    rows = tuple(
        (run.label, run.trainer, run.plans_name, run.configuration, " ".join(run.folds))
        for run in comparison.request.runs
    )
    if not rows:
        return None
    return Table("Runs; the first is the baseline.", ("run", "trainer", "plans", "configuration", "folds"), rows, 5)


def cost(costs: Mapping[str, Cost]) -> Table:
    """Costs: a row per quantity, a column per run, with the ratio to the baseline in parentheses."""
    all_costs = list(costs.values())

    def quantity(name: str, title: str, unit: float, digits: int) -> tuple[str, ...] | None:
        values = [getattr(c, name) for c in all_costs]
        if all(value is None for value in values):
            return None
        return (title, *_with_ratios([v / unit if v is not None else None for v in values], digits))

    measured_on = "; ".join(dict.fromkeys(c.measured_on for c in all_costs if c.measured_on))
    rows = [
        quantity("parameters", "parameters [million]", 1e6, 2),
        quantity("macs", "GMAC per patch", 1e9, 1),
        ("patch", *("x".join(map(str, c.patch_size)) or MISSING for c in all_costs)),
        ("batch", *(MISSING if c.batch_size is None else str(c.batch_size) for c in all_costs)),
        ("spacing [mm]", *("x".join(f"{step:g}" for step in c.spacing) or MISSING for c in all_costs)),
        quantity("held", "memory held in training [GB] (float16 autocast, counted)", _GIB, 2),
        quantity("peak", "peak memory of training [GB] (float16 autocast, counted)", _GIB, 2),
        quantity("measured_peak", f"peak memory of training [GB] ({measured_on}, measured)", _GIB, 2),
        quantity("inference_peak", "peak memory of prediction [GB] (float16 autocast, counted)", _GIB, 2),
        quantity("measured_inference_peak", f"peak memory of prediction [GB] ({measured_on}, measured)", _GIB, 2),
        ("epochs", *(MISSING if c.epochs is None else str(c.epochs) for c in all_costs)),
        ("iterations per epoch", *(MISSING if c.iterations is None else str(c.iterations) for c in all_costs)),
        quantity("seconds_per_epoch", "seconds per epoch", 1, 1),
        quantity("case_seconds", "prediction of a case [s]", 1, 1),
        ("trained on", *(c.machine for c in all_costs)),
    ]
    caption = (
        "Cost, with the ratio to the baseline, the first run. Held: alive after the forward pass of a step, beside "
    )
    caption += "weights and momentum; peak: the most at any time of it, these included; 1 GB is 2**30 bytes. "
    caption += "Seconds per epoch are as logged: comparable only on the same, otherwise idle machine."
    return Table(caption, ("quantity", *costs), tuple(row for row in rows if row is not None), name="cost")


def _with_ratios(values: Sequence[float | None], digits: int) -> list[str]:
    first = values[0]
    return [
        number(value, digits) + (f" ({value / first:.2f}{TIMES})" if i and first and value is not None else "")
        for i, value in enumerate(values)
    ]


def plans(comparison: Comparison) -> Table | None:
    """Settings in which the plans differ; None where they don't."""
    differing = plan_differences(comparison.request.runs)
    if not differing:
        return None
    rows = tuple((key, *values) for key, values in differing.items())
    labels = [run.label for run in comparison.request.runs]
    return Table("Settings of the plans that differ.", ("setting", *labels), rows, 1 + len(labels))
