"""Whatever runs and structures are called and however many they are, each figure shows all of its text."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from itertools import combinations
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from nnunet_ext import style
from nnunet_ext.comparison import figures, overlay
from nnunet_ext.comparison.accuracy import Evaluation, evaluate
from nnunet_ext.comparison.cost import Cost
from nnunet_ext.comparison.training import Training
from nnunet_ext.nnunet.training_log import Curves, TrainingLog

LONG = "nnU-Net with residual encoders, trained again with seed {} too"
JOINED = "nnUNetTrainerReversible__nnUNetResEncUNetMPlans_seed{}_3d_full"


def evaluation(runs: int, structures: int, cases: int, name: str = LONG, empty: bool = False) -> Evaluation:
    """Random scores; with `empty` the last structure is in no case."""
    random = np.random.default_rng(0)
    labels = [name.format(i) for i in range(runs)]
    rows = [
        {"run": label, "fold": "0", "case": f"case {case}", "structure": name.format(s)}
        for label in labels
        for case in range(cases)
        for s in range(structures)
    ]
    scores = pd.DataFrame(rows).assign(TP=5, FP=1, FN=1, Dice=random.uniform(0.5, 1, len(rows)))
    if empty:
        scores.loc[scores["structure"] == rows[-1]["structure"], ["TP", "FP", "FN", "Dice"]] = [0, 0, 0, np.nan]
    return evaluate("cross-validation", scores, labels)


def cost(i: int) -> Cost:
    names = ("macs", "held", "peak", "inference_peak", "measured_peak", "measured_inference_peak")
    values: dict[str, Any] = dict.fromkeys(names, 2**34 + i * 2**30)
    known = {"patch_size": (8, 8, 8), "batch_size": 2, "spacing": (1.0, 1.0, 1.0), "network": "N", "measured_on": ""}
    known |= {"parameters": 30_000_000, "epochs": 3, "iterations": 250, "machine": "GPU"}
    return Cost(**values, **known, seconds_per_epoch=123.4 + i, case_seconds=12.3)


def curves(epochs: int = 3) -> Training:
    values = tuple(np.linspace(0.1, 0.9, epochs))
    logged = Curves(training_loss=values, validation_loss=values, dice=values, seconds=values)
    log = TrainingLog(curves=logged, epochs=epochs, iterations=1, machine="", augmentation=None)
    return Training({"0": log, "1": log})


def scan(predictions: int, name: str = LONG, labels: int = 2) -> overlay.Scan:
    truth = np.zeros((6, 20, 24), dtype=np.uint8)
    for label in range(1, labels + 1):
        truth[1:5, label, 3:15] = label
    shown = {f"{name.format(i)}\nDice 0.9": truth for i in range(predictions)}
    names = {label: name.format(label) for label in range(1, labels + 1)}
    return overlay.Scan("case", truth * 1.0, (3.0, 1.0, 1.0), truth, shown, names, False)


def drawings(e: Evaluation, name: str = LONG) -> dict[str, Callable[..., Any]]:
    """All figures of a report, to be drawn for a width."""
    runs = len(e.labels)
    found: dict[str, Callable[..., Any]] = {
        "boxes": partial(figures.box_plots, e),
        "cost": partial(figures.accuracy_and_cost, e, {label: cost(i) for i, label in enumerate(e.labels)}),
        "curves": partial(figures.learning_curves, {label: curves() for label in e.labels}),
        "overlay": partial(overlay.overlay, scan(runs, name, min(len(e.structures), 15))),
    }
    if runs > 1:
        found["differences"] = partial(figures.differences, e, 1.0)
        found["paired"] = partial(figures.paired_cases, e)
    return found


def texts(figure: Any) -> Iterator[tuple[str, Bbox]]:
    """All text around the axes that is drawn, and where."""
    figure.draw_without_rendering()
    shown: list[Text] = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    shown += [text for text in (figure._supxlabel, figure._supylabel) if text is not None]
    for axes in figure.axes:
        if axes.get_visible():
            shown.append(axes.title)
            for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
                low, high = sorted(axis.get_view_interval())
                ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
                shown += [axis.label, *(tick.label1 for tick in ticks if tick.label1.get_visible())]
    for text in dict.fromkeys(shown):
        if text.get_text().strip():
            yield text.get_text(), text.get_window_extent()


def faults(figure: Any) -> list[str]:
    """Text that leaves the figure or covers other text."""
    shown, page, point = list(texts(figure)), figure.bbox, figure.dpi / 72
    cut = [
        f"{text!r} is cut"
        for text, box in shown
        if box.x0 < -point or box.y0 < -point or box.x1 > page.x1 + point or box.y1 > page.y1 + point
    ]
    return cut + [
        f"{one!r} overlaps {other!r}"
        for (one, a), (other, b) in combinations(shown, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > point and min(a.y1, b.y1) - max(a.y0, b.y0) > point
    ]


@pytest.mark.parametrize("width", [style.PAGE, style.COLUMN])
@pytest.mark.parametrize(
    ("runs", "structures", "cases", "name", "empty"),
    [
        (1, 1, 1, "run {}", False),
        (2, 1, 1, LONG, False),
        (2, 3, 30, "nnUNetTrainer{}", True),
        (3, 2, 4, JOINED, True),
        (8, 7, 5, LONG, False),
    ],
)
def test_no_text_is_cut_or_overlaps_another_and_axes_have_room(
    runs: int, structures: int, cases: int, name: str, empty: bool, width: float
) -> None:
    for kind, draw in drawings(evaluation(runs, structures, cases, name, empty), name).items():
        figure = draw(width=width)
        assert figure.get_figwidth() <= width
        assert faults(figure) == [], kind
        sizes = [size for axes in figure.axes if axes.get_visible() for size in axes.bbox.size]
        assert min(sizes) > 0.4 * figure.dpi, kind


@pytest.mark.parametrize("width", [style.PAGE, style.COLUMN])
@pytest.mark.parametrize("shape", [(1, 40, 30), (200, 30, 30), (3, 200, 30), (30, 30, 300)])
def test_overlay_of_a_narrow_scan_keeps_its_titles_apart(shape: tuple[int, int, int], width: float) -> None:
    truth = np.zeros(shape, dtype=np.uint8)
    truth[:, 5:15, 5:15] = 1
    shown = {f"run {i}\nDice 0.9": truth for i in range(3)}
    figure = overlay.overlay(overlay.Scan("case", truth * 1.0, (5, 1, 1), truth, shown, {1: "a"}, False), width=width)
    assert faults(figure) == []
    assert figure.get_figheight() < 16


def pixels(figure: Any) -> np.ndarray:
    return matplotlib.image.imread(BytesIO(style.rendered(figure, "png")), format="png")


@pytest.mark.parametrize("epochs", [1, 6])
@pytest.mark.parametrize("n", [1, 8])
def test_learning_curves_render(n: int, epochs: int) -> None:
    assert pixels(figures.learning_curves({f"run {i}": curves(epochs) for i in range(n)})).std() > 0.05


def test_curves_without_values_are_no_figure() -> None:
    assert figures.learning_curves({"a": Training({})}) is None


def test_many_structures_fill_several_rows() -> None:
    wide, low = (figures.box_plots(evaluation(2, n, 3)) for n in (13, 1))
    assert len(wide.axes) > len(low.axes) == 1
    assert wide.get_figheight() > 1.5 * low.get_figheight()


def test_every_case_is_a_point_beside_its_box() -> None:
    (axis,) = figures.box_plots(evaluation(2, 1, 7)).axes
    points = [line for line in axis.lines if line.get_marker() == "o"]
    boxes = [patch.get_path().get_extents() for patch in axis.patches]
    assert [len(line.get_xdata()) for line in points] == [7, 7]
    assert all(box.x1 < min(line.get_xdata()) for box, line in zip(boxes, points, strict=True))


def test_margin_that_nobody_chose_is_not_drawn() -> None:
    e = evaluation(2, 1, 5)
    (bare,), (banded,) = (figures.differences(e, margin).axes for margin in (None, 2.0))
    assert len(bare.patches) == 0
    assert (banded.patches[0].get_extents().width > 0, len(banded.patches)) == (True, 1)


def test_same_figure_gives_the_same_bytes_in_every_process() -> None:
    code = """if True:
        import sys
        from nnunet_ext import style
        with style.page(2) as figure:
            axis = figure.subplots()
            axis.boxplot([[1, 2, 3]], patch_artist=True)["boxes"][0].set_hatch("//")
            axis.plot([1, 2], [1, 2], "o", label="run", rasterized=True)
            style.legend_below(figure, axis.get_legend_handles_labels()[0])
        for kind in ("png", "svg", "pdf"):
            sys.stdout.buffer.write(style.rendered(figure, kind))"""
    one, two = (
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    )
    assert one == two != b""


def test_many_points_are_pixels_in_vector_files() -> None:
    few, many = (len(style.rendered(figures.box_plots(evaluation(2, 1, n)), "svg")) for n in (50, 3000))
    assert many < 3 * few


@pytest.mark.parametrize("text", ["", "a b", "W" * 40, "ab_cd_" * 20, "a  b " * 30])
@pytest.mark.parametrize("inches", [0.2, 1.0])
def test_wrapped_text_keeps_its_letters_and_its_width(text: str, inches: float) -> None:
    lines = style.wrapped(text, inches).split("\n")
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(style._width(line) <= inches for line in lines)
