"""Figures of accuracy: box plots, differences, paired cases; and of cost and learning.

Each is drawn for a width: `PAGE`, or `COLUMN` for a column of a paper and for a phone. What is small anyway is as wide
as a column in both. The caller renders them (`style.rendered`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from nnunet_ext.comparison.accuracy import MEAN, Evaluation, Structure
from nnunet_ext.comparison.cost import Cost
from nnunet_ext.comparison.training import Training
from nnunet_ext.escaping import drawn
from nnunet_ext.printable import counted
from nnunet_ext.style import COLUMN, LINE, PAGE, SMALL, RunStyle, legend_below, page, run_styles, tidy, wrapped

_VECTORS = 2000  # points of a figure that SVG and PDF hold as such; more are pixels there
GIB, GIGA, MEGA = 2**30, 1e9, 1e6


def box_plots(evaluation: Evaluation, metric: str = "Dice", width: float = PAGE) -> Any:
    """One box per structure and run, and beside it every case as a point."""
    names = _shown(evaluation)
    styles = run_styles(evaluation.labels)
    group = max(0.85, 0.17 * len(styles))  # inches of a structure, at least
    fitting = {w: max(1, int((w - 0.6) / group)) for w in (COLUMN, width)}
    width = COLUMN if len(names) <= fitting[COLUMN] else width
    rows = np.array_split(np.arange(len(names)), math.ceil(len(names) / fitting[width]))
    ticks = [wrapped(_drawn(evaluation, name), 0.95 * (width - 0.6) / len(rows[0])) for name in names]
    lines = max(tick.count("\n") for tick in ticks)
    is_large = len(names) * evaluation.compared.groupby("run")["case"].nunique().sum() > _VECTORS
    with page(len(rows) * (1.4 + lines * LINE), width) as figure:
        axes = figure.subplots(len(rows), 1, squeeze=False, sharey=True)[:, 0]
        for axis, row in zip(axes, rows, strict=True):
            for place, i in enumerate(row):
                _boxes(axis, place, evaluation.values(metric, names[i]), styles, is_large)
            axis.set_xticks(range(len(row)), [ticks[i] for i in row])
            axis.set_xlim(-0.5, len(row) - 0.5)
            axis.set_ylabel(f"{metric} [mm]" if metric == "HD95" else metric)
            tidy(axis, "y")
        legend_below(figure, _signs(styles, "patch"))
    return figure


def _shown(evaluation: Evaluation) -> list[Structure]:
    """The structures and, of several, their mean."""
    several = len(evaluation.structures) > 1
    return [MEAN, *evaluation.structures] if several else list(evaluation.structures)


def _drawn(evaluation: Evaluation, structure: Structure) -> str:
    return drawn(evaluation.name_of(structure), evaluation.structures)


def _boxes(axis: Any, place: int, values: Any, styles: Mapping[str, RunStyle], is_large: bool) -> None:
    """Boxes of the runs side by side; in each one's place the box stands on the left, its cases on the right."""
    slot = 0.86 / len(styles)
    random = np.random.default_rng(0)
    for i, (label, style) in enumerate(styles.items()):
        middle = place + (i - (len(styles) - 1) / 2) * slot
        own = values[label].dropna().to_numpy()
        if not own.size:
            height = axis.get_xaxis_transform()
            look = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 6, "color": "0.35"}
            axis.text(middle, 0.05, "no value", transform=height, **look)
            continue
        look = {"patch_artist": True, "showfliers": False, "manage_ticks": False}
        box = axis.boxplot([own], positions=[middle - 0.2 * slot], widths=0.42 * slot, **look)
        box["boxes"][0].set(facecolor=f"{style.colour}99", edgecolor="black", hatch=style.hatch, linewidth=0.6)
        box["medians"][0].set(color="black", linewidth=1.4)
        for part in (*box["whiskers"], *box["caps"]):
            part.set(linewidth=0.6)
        spread = middle + slot * random.uniform(0.1, 0.4, own.size)
        look = {"markersize": 1.8, "alpha": 0.7 if own.size <= 50 else 0.4, "markeredgewidth": 0}
        axis.plot(spread, own, "o", color="black", rasterized=is_large, **look)


def differences(evaluation: Evaluation, margin: float | None, width: float = PAGE) -> Any:
    """A panel per run: mean difference to the baseline and its interval for each structure; a margin as a band."""
    baseline, *others = evaluation.labels
    names, styles = _shown(evaluation), run_styles(evaluation.labels)
    width = COLUMN if len(others) == 1 else width
    ticks = [wrapped(_drawn(evaluation, name), 0.3 * min(width, 5)) for name in names]
    rows, columns = _grid(len(others), int(0.7 * width / 1.15))
    titles = [wrapped(drawn(label, others), 0.68 * width / columns, 8) for label in others]
    height = max(0.45, len(names) * (LINE * (1 + max(tick.count("\n") for tick in ticks)) + 0.07))
    height += LINE * (1 + max(title.count("\n") for title in titles)) + 0.3
    with page(rows * height + 0.2, width) as figure:
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axis, label, title in zip(axes.flat, others, titles, strict=False):
            if margin is not None:
                axis.axvspan(-margin, margin, color="0.88", zorder=0)
            axis.axvline(0, color="black", linewidth=0.8)
            for place, structure in enumerate(names):
                found = evaluation.comparand(label, "Dice", structure).difference
                axis.plot([100 * found.low, 100 * found.high], [place] * 2, color=styles[label].colour, linewidth=1.6)
                axis.plot(100 * found.mean, place, styles[label].marker, color=styles[label].colour, markersize=4.5)
            axis.set_title(title)
            axis.tick_params(labelbottom=True)
            tidy(axis, "x")
        axes[0][0].set_yticks(range(len(names)), ticks)
        axes[0][0].set_ylim(len(names) - 0.5, -0.5)
        _hide(list(axes.flat)[len(others) :])
        _label_below(figure, f"Dice points against {drawn(baseline)}: mean and 95 % interval (right: better)")
    return figure


def paired_cases(evaluation: Evaluation, width: float = PAGE) -> Any:
    """A panel per run: mean Dice of each case with the baseline and with the run."""
    baseline, *others = evaluation.labels
    dice, styles = evaluation.values("Dice", MEAN), run_styles(evaluation.labels)
    width = COLUMN if len(others) == 1 else width
    rows, columns = _grid(len(others), 4 if width > COLUMN else 2)
    side = min((width - 0.3) / columns, 2.2)
    titles = []
    for label in others:
        found = evaluation.comparand(label).difference
        counts = f"better in {found.better}, worse in {found.worse} of {counted(found.n, 'case')}"
        titles.append("\n".join(wrapped(text, side - 0.15, SMALL) for text in (drawn(label, others), counts)))
    height = side + LINE * (1 + max(title.count("\n") for title in titles)) + 0.15
    low = math.floor(10 * np.nanmin(dice.to_numpy(), initial=0.9)) / 10 - 0.02
    with page(rows * height + 0.1, max(COLUMN, columns * side + 0.3)) as figure:
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axis, label, title in zip(axes.flat, others, titles, strict=False):
            axis.plot([low, 1.02], [low, 1.02], color="black", linewidth=0.8)
            look = {"color": styles[label].colour, "markersize": 3.2, "alpha": 0.7, "markeredgewidth": 0}
            axis.plot(dice[baseline], dice[label], styles[label].marker, rasterized=len(dice) > _VECTORS, **look)
            axis.set(xlim=(low, 1.02), ylim=(low, 1.02), aspect="equal")
            axis.set_title(title, fontsize=SMALL)
            axis.locator_params(nbins=4)
            axis.tick_params(labelbottom=True)
            tidy(axis)
        _hide(list(axes.flat)[len(others) :])
        _label_below(figure, f"mean Dice of {drawn(baseline)}")
        figure.supylabel("mean Dice of the run", fontsize=8)
    return figure


def learning_curves(trainings: Mapping[str, Training], width: float = PAGE) -> Any | None:
    """Loss and Dice of the patches over the epochs: mean of the folds, and each fold thinly; None without any."""
    from matplotlib.ticker import MaxNLocator

    known = {label: list(t.curves.values()) for label, t in trainings.items() if t.curves}
    styles = run_styles(list(trainings))
    if not known:
        return None
    rows, columns = _grid(3, 3 if width > COLUMN else 1)
    is_large = sum(len(curves.dice) for folds in known.values() for curves in folds) > _VECTORS
    with page(1.65 * rows, width) as figure:
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for label, folds in known.items():
            for axis, name in zip(axes, ("training_loss", "validation_loss", "dice"), strict=True):
                _curve(axis, [getattr(curves, name) for curves in folds], styles[label], is_large)
        for axis, title in zip(axes, ("Training loss", "Validation loss", "Dice of validation patches"), strict=True):
            axis.set(xlabel="Epoch", title=title, xlim=(0, None))
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            tidy(axis)
        axes[2].set_ylim(0, 1)
        legend_below(figure, _signs({label: styles[label] for label in known}, "line"))
    return figure


def _curve(axis: Any, folds: Sequence[Sequence[float]], style: RunStyle, is_large: bool) -> None:
    for values in folds:
        axis.plot(range(1, len(values) + 1), values, color=style.colour, linewidth=0.5, alpha=0.35, rasterized=is_large)
    length = min(len(values) for values in folds)
    mean = np.mean([values[:length] for values in folds], axis=0)
    mark: dict[str, Any] = {"marker": style.marker, "markersize": 3.5, "markevery": max(1, length // 10)}
    axis.plot(range(1, length + 1), mean, color=style.colour, linestyle=style.line, linewidth=1.4, **mark)


def accuracy_and_cost(evaluation: Evaluation, costs: Mapping[str, Cost], width: float = PAGE) -> Any | None:
    """Mean Dice against every cost that is known of at least one run; None where none is."""
    from matplotlib.ticker import MaxNLocator

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
    rows, columns = _grid(len(known), int(width / 1.35))
    styles = run_styles(evaluation.labels)
    with page(1.45 * rows, width) as figure:
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axis, (title, (name, unit)) in zip(axes.flat, known.items(), strict=False):
            for label, cost in costs.items():
                value = getattr(cost, name)
                if value is not None:
                    mean = evaluation.mean(label).mean
                    axis.plot(value / unit, mean, styles[label].marker, color=styles[label].colour, markersize=6)
            axis.set_xlabel(wrapped(title, 0.8 * width / columns, 8))
            axis.margins(y=0.2)
            axis.set_xlim(0, 1.15 * max(line.get_xdata()[0] for line in axis.lines))
            axis.xaxis.set_major_locator(MaxNLocator(3))
            tidy(axis)
        _hide(list(axes.flat)[len(known) :])
        for axis in axes[:, 0]:
            axis.set_ylabel("Mean Dice")
        legend_below(figure, _signs(styles, "marker"))
    return figure


def _grid(panels: int, most: int) -> tuple[int, int]:
    """Rows and columns for this many panels, with at most so many in a row and few empty places."""
    rows = math.ceil(panels / max(1, most))
    return rows, math.ceil(panels / rows)


def _hide(axes: Sequence[Any]) -> None:
    for axis in axes:
        axis.set_visible(False)


def _label_below(figure: Any, text: str) -> None:
    """Label the x axes of all panels; the figure grows by it."""
    label = wrapped(text, 0.95 * figure.get_figwidth(), 8)
    figure.set_figheight(figure.get_figheight() + LINE * (1 + label.count("\n")) + 0.1)
    figure.supxlabel(label, fontsize=8)


def _signs(styles: Mapping[str, RunStyle], kind: Literal["patch", "line", "marker"]) -> list[Any]:
    """What a legend shows of each run."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Patch(facecolor=f"{s.colour}99", edgecolor="black", hatch=s.hatch, linewidth=0.6, label=drawn(label, styles))
        if kind == "patch"
        else Line2D(
            [],
            [],
            color=s.colour,
            marker=s.marker,
            linestyle=s.line if kind == "line" else "",
            label=drawn(label, styles),
        )
        for label, s in styles.items()
    ]
