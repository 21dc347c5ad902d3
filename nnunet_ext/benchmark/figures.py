"""Figures of a report: ratios to the baseline as bars, and memory against depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nnunet_ext.benchmark.records import DepthPoint, Method, Report
from nnunet_ext.benchmark.table import shape
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.style import page, rendered

# Quantity -> title of its panel.
PANELS = {
    "parameters": "Weights",
    "held_bytes": "Memory held, float16",
    "peak_bytes": "Peak memory of a training step, float16",
    "inference_peak_bytes": "Memory of inference, float16",
    "measured_peak_bytes": "Measured peak of a training step",
    "compiled_peak_bytes": "Measured peak, compiled",
    "step_seconds": "Time of a training step",
    "compiled_step_seconds": "Time of a training step, compiled",
    "patch_seconds": "Time of inference",
}
_HATCHES = ("", "///", "...", "\\\\\\", "xx", "ooo", "--", "++")
_MARKERS, _LINES = ("o", "s", "^", "D", "v", "P"), ("-", "--", "-.", ":")
# Okabe and Ito (2008), safe for colour-blind readers; hatches, markers and lines serve greyscale prints.
_COLOURS = ("#999999", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#F0E442")
_WIDTH = 7.2  # inches


def ratio_bars(report: Report) -> bytes:
    """PNG with a panel per quantity and a bar per method: its ratio to the baseline."""
    panels = {
        key: title
        for key, title in PANELS.items()
        if any(method.ratios.get(key) is not None for method in report.methods)
    }
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows = max(1, math.ceil(len(panels) / columns))
    height = rows * (0.7 + 0.24 * len(report.methods)) + 0.4
    with page(height, _WIDTH) as figure:
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axis, (key, title) in zip(axes.flat, panels.items(), strict=False):
            _draw_bars(axis, report.methods, key)
            axis.set_title(title)
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_axis_off()
        axes[0][0].invert_yaxis()  # shared by all
        figure.supxlabel(f"ratio to {report.baseline}", fontsize=8)
        figure.suptitle(_title(report), fontsize=8)
    return rendered(figure, "png")


def _draw_bars(axis: Any, methods: tuple[Method, ...], key: str) -> None:
    names = [method.label for method in methods]
    values = [method.ratios.get(key) for method in methods]
    bars = axis.barh(names, [value or 0.0 for value in values], height=0.72, edgecolor="black", linewidth=0.6)
    for index, (bar, value) in enumerate(zip(bars, values, strict=True)):
        bar.set_facecolor(_COLOURS[index % len(_COLOURS)])
        bar.set_hatch(_HATCHES[index % len(_HATCHES)])
        text = "not known" if value is None else f"{value:.2f}"
        axis.annotate(text, (value or 0.0, index), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axis.axvline(1.0, color="black", linewidth=0.6, linestyle="--")
    axis.set_xlim(0, 1.22 * max(1.0, *(value or 0.0 for value in values)))
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(length=2, width=0.6)


def depth_curves(report: Report) -> bytes:
    """PNG of the memory held and of the peak against depth, one line per trainer."""
    curves: dict[str, list[DepthPoint]] = {}
    for point in report.depth:
        curves.setdefault(point.trainer, []).append(point)
    with page(3.0, _WIDTH) as figure:
        held, peak = figure.subplots(1, 2, sharey=True)
        _draw_curves(held, curves, "held_bytes")
        _draw_curves(peak, curves, "peak_bytes")
        held.set(title=PANELS["held_bytes"], ylabel="GB of 2**30 bytes")
        peak.set_title(PANELS["peak_bytes"])
        held.legend(frameon=False)
        figure.suptitle(_title(report), fontsize=8)
    return rendered(figure, "png")


def _draw_curves(axis: Any, curves: Mapping[str, list[DepthPoint]], key: str) -> None:
    for index, (trainer, points) in enumerate(curves.items()):
        axis.plot(
            [point.depth for point in points],
            [getattr(point, key) / GIB for point in points],
            label=trainer,
            color=_COLOURS[-1 - index % len(_COLOURS)] if index else "black",
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle=_LINES[index % len(_LINES)],
            markersize=4,
            linewidth=1.2,
        )
    axis.set_xlabel("blocks per stage (pairs of convolutions)")
    axis.set_xticks(sorted({point.depth for points in curves.values() for point in points}))
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.grid(linewidth=0.3, alpha=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _title(report: Report) -> str:
    patch = f"patch {shape(report.patch_size)}, batch {report.batch_size}, {report.precision}"
    timed = f"; times: {shape(report.time_patch_size)}, {report.device}" if report.repeats else ""
    return f"{report.plans}, {report.configuration}: {patch}{timed}"
