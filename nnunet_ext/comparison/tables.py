"""Tables of the report, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnunet_ext.comparison.accuracy import LESS_IS_BETTER, MEAN, Evaluation
from nnunet_ext.comparison.compare import Comparison
from nnunet_ext.comparison.cost import Cost, plan_differences

MISSING = "\N{EN DASH}"
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


def accuracy(evaluation: Evaluation, metric: str) -> Table:
    """Means of one metric: a row per structure, a column per run."""
    unit = " in mm, less is better" if metric == "HD95" else ""
    rows = []
    for structure in (*evaluation.structures, MEAN):
        means = [evaluation.mean(label, metric, structure) for label in evaluation.labels]
        counts = list(dict.fromkeys(str(m.n) for m in means))
        digits = 2 if metric == "HD95" else 4
        values = (f"{number(m.mean, digits)} ± {number(m.standard_deviation, digits - 1)}" for m in means)
        rows.append((evaluation.name_of(structure), " / ".join(counts), *values))
    caption = f"{metric}{unit}, mean ± standard deviation over cases; n: cases with a value, per run where they differ."
    name = f"{evaluation.name}-{metric.lower()}"
    return Table(caption, ("structure", "n", *evaluation.labels), tuple(rows), name=name)


def differences(evaluation: Evaluation, metric: str, margin: float) -> Table:
    """Paired differences to the baseline: a row per structure and run."""
    baseline, *others = evaluation.labels
    factor, unit = (1.0, "mm") if metric == "HD95" else (100.0, "points, 1 point = 0.01")
    rows = []
    for structure in (MEAN, *evaluation.structures) if len(evaluation.structures) > 1 else evaluation.structures:
        for label in others:
            c = evaluation.comparand(label, metric, structure)
            d = c.difference
            span = f"{signed(factor * d.low)} to {signed(factor * d.high)}" if not math.isnan(d.low) else MISSING
            name = evaluation.name_of(structure)
            row = (name, label, str(d.n), signed(factor * d.mean), span, p_value(d.p), p_value(c.p_holm))
            rows.append((*row, f"{d.better} / {d.worse}", *([c.verdict] if c.verdict else [])))
    sense = "less is better" if metric in LESS_IS_BETTER else "more is better"
    caption = f"{metric}, difference to {baseline} over the same cases ({unit}; {sense}): mean, 95 % bootstrap "
    caption += "interval, Wilcoxon signed-rank p, the same after Holm's correction, cases with a higher / lower value"
    caption += f", verdict at a margin of {margin:.1f} points." if metric == "Dice" else "."
    header = ("structure", "run", "n", "difference", "95 % interval", "p", "p (Holm)", "higher / lower")
    name = f"{evaluation.name}-{metric.lower()}-differences"
    return Table(caption, (*header, "verdict") if metric == "Dice" else header, tuple(rows), 2, name)


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


def ranks(evaluation: Evaluation) -> Table:
    """Rank frequencies: a row per run."""
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
