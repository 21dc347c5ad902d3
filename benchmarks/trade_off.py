"""Draws Dice against memory: one point for each training, numbered as in the legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_ext.memory.tracker import GIB
from nnunet_ext.style import legend_below, page, rendered, run_styles, tidy

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Point:
    """One training.

    Args:
        name: In the legend.
        dice: Mean over cases.
        peak: Bytes of a training step, counted.
    """

    name: str
    dice: float
    peak: int


def svg(points: Sequence[Point], ylabel: str, height: float = 3.0) -> bytes:
    """The figure; a name that begins with "default" is drawn hollow. The same points give the same bytes."""
    from matplotlib.lines import Line2D

    styles = run_styles([point.name for point in points])
    unit, word = (GIB, "GB") if max(point.peak for point in points) >= GIB else (MIB, "MB")
    handles = []
    with page(height) as figure:
        axis = figure.subplots()
        for number, point in enumerate(points, 1):
            style = styles[point.name]
            face = "white" if point.name.startswith("default") else style.colour
            look = {"color": style.colour, "marker": style.marker, "markerfacecolor": face, "linestyle": ""}
            axis.plot(point.peak / unit, point.dice, markersize=6, **look)
            place = (point.peak / unit, point.dice)
            axis.annotate(str(number), place, xytext=(4, 3), textcoords="offset points", fontsize=7)
            handles.append(Line2D([], [], label=f"{number}  {point.name}", **look))
        axis.set(xlabel=f"Peak of a training step [{word}], float16 autocast, counted", ylabel=ylabel, xlim=(0, None))
        axis.margins(0.08)
        tidy(axis)
        legend_below(figure, handles)
        return rendered(figure, "svg")
