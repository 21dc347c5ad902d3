"""The look of all figures: colours for the colour-blind, and markers, hatches and line styles for greyscale prints."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

WIDTH = 6.8  # inches, a page
_DPI = 200
_RC: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    # names may hold "$"
    "text.parse_math": False,
    "text.usetex": False,
}
# Okabe and Ito (2008)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_HATCHES = ("", "////", "....", "xxxx", "----", "\\\\\\\\")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))


@dataclass(frozen=True, kw_only=True)
class RunStyle:
    """Look of one run in all figures."""

    colour: str
    marker: str
    hatch: str
    line: Any


def run_styles(labels: Sequence[str]) -> dict[str, RunStyle]:
    """A look for each run, in order; beyond six they repeat with other combinations."""
    n = len(_COLOURS)
    return {
        label: RunStyle(
            colour=_COLOURS[i % n],
            marker=_MARKERS[(i + i // n) % n],
            hatch=_HATCHES[(i + i // n) % n],
            line=_LINES[i % n],
        )
        for i, label in enumerate(labels)
    }


@contextmanager
def page(height: float, width: float = WIDTH) -> Iterator[Any]:
    """Give a figure of this size, in inches, drawn in the house's style."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(Glyph|constrained_layout)")  # names in any script and of any length
        yield Figure(figsize=(width, height), layout="constrained")


def tidy(axis: Any, grid: str = "both") -> None:
    """Leave out the frame's upper and right side; draw a light grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, linewidth=0.3, alpha=0.6)
    axis.set_axisbelow(True)


def png(figure: Any, legend: float = 0.0) -> bytes:
    """Render; `legend` inches are kept free at the bottom. The same figure gives the same bytes."""
    free = legend / figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, free, 1, 1 - free), h_pad=0.08, w_pad=0.04)
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI, metadata={"Software": None})
    return stream.getvalue()
