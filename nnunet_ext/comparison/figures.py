"""Figures of accuracy: box plots, differences, paired cases, ranks; and of cost and learning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np

from nnunet_ext.comparison.accuracy import MEAN, Evaluation, Structure
from nnunet_ext.comparison.cost import Cost
from nnunet_ext.comparison.training import Training
from nnunet_ext.escaping import drawn
from nnunet_ext.printable import counted
from nnunet_ext.style import WIDTH, RunStyle, page, png, run_styles, tidy

_PER_ROW = 6  # structures in a row of box plots
_WRAP = 18  # characters of a line below a box plot
_LEGEND = 0.22  # inches of a row of the legend
GIB, GIGA, MEGA = 2**30, 1e9, 1e6


def box_plots(evaluation: Evaluation, metric: str = "Dice") -> bytes:
    """One box per structure and run, with every case as a point."""
    names = _shown(evaluation)
    rows = [names[i : i + _PER_ROW] for i in range(0, len(names), _PER_ROW)]
    styles = run_styles(evaluation.labels)
    with page(2.5 * len(rows) + 0.4) as figure:
        axes = figure.subplots(len(rows), 1, squeeze=False, sharey=True)[:, 0]
        for axis, row in zip(axes, rows, strict=True):
            for place, structure in enumerate(row):
                _boxes(axis, place, evaluation.values(metric, structure), styles)
            axis.set_xticks(range(len(row)), [fill(_drawn(evaluation, s), _WRAP) for s in row])
            axis.set_xlim(-0.5, max(len(rows[0]), 2) - 0.5 if len(rows) > 1 else len(row) - 0.5)
            axis.set_ylabel(f"{metric} [mm]" if metric == "HD95" else metric)
            tidy(axis, "y")
        return _with_legend(figure, styles, patches=True)


def _shown(evaluation: Evaluation) -> list[Structure]:
    """The structures and, of several, their mean."""
    several = len(evaluation.structures) > 1
    return [MEAN, *evaluation.structures] if several else list(evaluation.structures)


def _drawn(evaluation: Evaluation, structure: Structure) -> str:
    return drawn(evaluation.name_of(structure), evaluation.structures)


def _boxes(axis: Any, place: int, values: Any, styles: Mapping[str, RunStyle]) -> None:
    width = 0.8 / len(styles)
    random = np.random.default_rng(0)
    for i, (label, style) in enumerate(styles.items()):
        middle = place + (i - (len(styles) - 1) / 2) * width
        own = values[label].dropna().to_numpy()
        if not own.size:
            continue
        jitter = middle + random.uniform(-0.25, 0.25, own.size) * width
        axis.plot(jitter, own, ".", markersize=2, color="black", alpha=0.3, zorder=1, markeredgewidth=0)
        box = axis.boxplot([own], positions=[middle], widths=0.8 * width, patch_artist=True, showfliers=False)
        box["boxes"][0].set(facecolor=f"{style.colour}99", edgecolor="black", hatch=style.hatch, linewidth=0.7)
        box["medians"][0].set(color="black", linewidth=1.4)
        for part in (*box["whiskers"], *box["caps"]):
            part.set(linewidth=0.7)


def differences(evaluation: Evaluation, margin: float) -> bytes:
    """Mean difference to the baseline and its interval for each structure; the margin as a band."""
    baseline, *others = evaluation.labels
    names = _shown(evaluation)
    styles = run_styles(evaluation.labels)
    with page(0.9 + 0.2 * len(names) * (len(others) + 0.8)) as figure:
        axis = figure.subplots()
        axis.axvspan(-margin, margin, color="0.9", zorder=0, label=f"margin of {margin:.1f} points")
        axis.axvline(0, color="black", linewidth=0.8)
        for place, structure in enumerate(names):
            for i, label in enumerate(others):
                found = evaluation.comparand(label, "Dice", structure).difference
                height = place + (i - (len(others) - 1) / 2) * 0.7 / len(others)
                style = styles[label]
                axis.plot([100 * found.low, 100 * found.high], [height] * 2, color=style.colour, linewidth=1.6)
                axis.plot(100 * found.mean, height, style.marker, color=style.colour, markersize=4.5)
        axis.set_yticks(range(len(names)), [_drawn(evaluation, structure) for structure in names])
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_xlabel(f"Dice points to {drawn(baseline)}, mean and 95 % interval (right: better)")
        tidy(axis, "x")
        return _with_legend(figure, {label: styles[label] for label in others}, extra=axis)


def paired_cases(evaluation: Evaluation) -> bytes:
    """Mean Dice of each case with the baseline and with each other run."""
    baseline, *others = evaluation.labels
    dice, styles = evaluation.values("Dice", MEAN), run_styles(evaluation.labels)
    columns = min(3, len(others))
    rows = math.ceil(len(others) / columns)
    side = WIDTH / max(columns, 2)
    low = max(0.0, math.floor(10 * float(np.nanmin(dice.to_numpy()))) / 10 - 0.02)
    with page(rows * side, columns * side) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for axis, label in zip(axes, others, strict=False):
            style, found = styles[label], evaluation.comparand(label).difference
            axis.plot([low, 1], [low, 1], color="black", linewidth=0.8)
            axis.plot(
                dice[baseline],
                dice[label],
                style.marker,
                color=style.colour,
                markersize=3,
                alpha=0.6,
                markeredgewidth=0,
            )
            axis.set(
                xlim=(low, 1),
                ylim=(low, 1),
                aspect="equal",
                xlabel=f"Dice, {drawn(baseline, evaluation.labels)}",
                ylabel=f"Dice, {drawn(label, evaluation.labels)}",
            )
            axis.set_title(f"better in {found.better}, worse in {found.worse} of {counted(found.n, 'case')}")
            tidy(axis)
        for axis in list(axes)[len(others) :]:
            axis.set_visible(False)
        return png(figure)


def ranks(evaluation: Evaluation) -> bytes:
    """Share of the cases in which each run takes each rank."""
    table = evaluation.ranks
    total = max(1, int(table.sum(axis=1).max()))
    with page(0.8 + 0.34 * len(table)) as figure:
        axis = figure.subplots()
        left = np.zeros(len(table))
        for rank in map(int, table.columns):
            share = table[rank].to_numpy() / total
            grey = str(0.35 + 0.55 * (rank - 1) / max(1, len(table.columns) - 1))
            axis.barh(range(len(table)), share, 0.7, left, color=grey, edgecolor="black", linewidth=0.5)
            for y, (start, width) in enumerate(zip(left, share, strict=True)):
                if width > 0.05:
                    text = f"{rank}."
                    colour = "white" if float(grey) < 0.5 else "black"
                    axis.text(start + width / 2, y, text, ha="center", va="center", color=colour, fontsize=7)
            left += share
        axis.set_yticks(range(len(table)), [drawn(label, table.index) for label in table.index])
        axis.invert_yaxis()
        axis.set(xlim=(0, 1), xlabel=f"share of {counted(total, 'case')} in which a run takes this rank by mean Dice")
        axis.spines[["top", "right"]].set_visible(False)
        return png(figure)


def learning_curves(trainings: Mapping[str, Training]) -> bytes | None:
    """Loss and Dice of the patches over the epochs: mean of the folds, and each fold thinly; None without any."""
    from matplotlib.ticker import MaxNLocator

    known = {label: list(t.curves.values()) for label, t in trainings.items() if t.curves}
    styles = run_styles(list(trainings))
    if not known:
        return None
    with page(2.6) as figure:
        axes = figure.subplots(1, 3)
        for label, folds in known.items():
            for axis, name in zip(axes, ("training_loss", "validation_loss", "dice"), strict=True):
                _curve(axis, [getattr(curves, name) for curves in folds], styles[label])
        for axis, title in zip(axes, ("Training loss", "Validation loss", "Dice of validation patches"), strict=True):
            axis.set(xlabel="Epoch", title=title)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            tidy(axis)
        axes[2].set_ylim(0, 1)
        return _with_legend(figure, {label: styles[label] for label in known}, lines=True)


def _curve(axis: Any, folds: Sequence[Sequence[float]], style: RunStyle) -> None:
    for values in folds:
        axis.plot(range(1, len(values) + 1), values, color=style.colour, linewidth=0.5, alpha=0.35)
    length = min(len(values) for values in folds)
    mean = np.mean([values[:length] for values in folds], axis=0)
    mark: dict[str, Any] = {"marker": style.marker, "markersize": 3.5, "markevery": max(1, length // 10)}
    axis.plot(range(1, length + 1), mean, color=style.colour, linestyle=style.line, linewidth=1.4, **mark)


def accuracy_and_cost(evaluation: Evaluation, costs: Mapping[str, Cost]) -> bytes | None:
    """Mean Dice against every cost that is known of at least one run; None where none is."""
    panels = {
        "Parameters [million]": ("parameters", MEGA),
        "GMAC per patch": ("macs", GIGA),
        "Peak memory of training [GB]": ("peak", GIB),
        "Training [s per epoch]": ("seconds_per_epoch", 1.0),
        "Prediction [s per case]": ("case_seconds", 1.0),
    }
    known = {t: p for t, p in panels.items() if any(getattr(c, p[0]) is not None for c in costs.values())}
    if not known:
        return None
    columns = min(3, len(known))
    rows = math.ceil(len(known) / columns)
    styles = run_styles(evaluation.labels)
    with page(2.0 * rows + 0.3) as figure:
        axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
        for axis, (title, (name, unit)) in zip(axes, known.items(), strict=False):
            for label, cost in costs.items():
                value = getattr(cost, name)
                if value is not None:
                    mean = evaluation.mean(label).mean
                    axis.plot(value / unit, mean, styles[label].marker, color=styles[label].colour, markersize=6)
            axis.set_xlabel(title)
            axis.margins(y=0.2)
            axis.set_xlim(0, 1.15 * max(line.get_xdata()[0] for line in axis.lines))
            tidy(axis)
        for axis in axes[len(known) :]:
            axis.set_visible(False)
        for row in range(rows):
            axes[row * columns].set_ylabel("Mean Dice")
        return _with_legend(figure, styles)


def _with_legend(
    figure: Any, styles: Mapping[str, RunStyle], patches: bool = False, lines: bool = False, extra: Any = None
) -> bytes:
    """Render with a legend of the runs below."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(facecolor=f"{s.colour}99", edgecolor="black", hatch=s.hatch, linewidth=0.7, label=drawn(label, styles))
        if patches
        else Line2D(
            [], [], color=s.colour, marker=s.marker, linestyle=s.line if lines else "", label=drawn(label, styles)
        )
        for label, s in styles.items()
    ]
    if extra is not None:
        handles += extra.get_legend_handles_labels()[0]
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(WIDTH * 14 / (longest + 8))))
    figure.legend(handles=handles, loc="lower center", ncol=columns, frameon=False)
    return png(figure, legend=_LEGEND * math.ceil(len(handles) / columns))
