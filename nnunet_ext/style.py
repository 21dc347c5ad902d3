"""The look of all figures: colours for the colour-blind, and markers, hatches and line styles for greyscale prints."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any, Literal

Kind = Literal["png", "svg", "pdf"]
PAGE, COLUMN = 6.8, 3.4  # inches: widths of a page, and of one of its two columns or a phone
LINE = 0.13  # inches of a line of text
SMALL = 7.5  # points: ticks, legends and all else but titles of axes
_DPI = 200
_RC: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "text.hinting": "none",  # as wide in a PNG as in an SVG
    "svg.hashsalt": "nnunet-ext",
    "pdf.fonttype": 42,  # TrueType, as journals ask for
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
def page(height: float, width: float = PAGE) -> Iterator[Any]:
    """Give a figure of this size, in inches, in the house's style."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.06, w_pad=0.04)
        yield figure


@contextmanager
def _style() -> Iterator[None]:
    from matplotlib import rc_context

    with rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"(Glyph|constrained_layout)")  # names in any script and of any length
        yield


def rendered(figure: Any, kind: Kind) -> bytes:
    """A file of the figure. The same figure gives the same bytes."""
    unsaid = {"png": ["Software"], "svg": ["Creator", "Date"], "pdf": ["Creator", "Producer", "CreationDate"]}
    stream = BytesIO()
    with _style():
        figure.savefig(stream, format=kind, dpi=_DPI, metadata=dict.fromkeys(unsaid[kind]))
    figure.set_layout_engine(None)  # laid out; with one each file would draw twice
    return stream.getvalue()


def tidy(axis: Any, grid: str = "both") -> None:
    """Leave out the frame's upper and right side; draw a light grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, linewidth=0.3, alpha=0.6)
    axis.set_axisbelow(True)


def legend_below(figure: Any, handles: Sequence[Any]) -> None:
    """Put a legend below all axes, in as many columns as fit; long labels are broken, and the figure grows by it."""
    if not handles:
        return
    width, sign = figure.get_figwidth(), 0.5  # inches; of a sign and what surrounds it
    labels = [wrapped(str(handle.get_label()), width - sign) for handle in handles]
    widest = max(_width(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(len(handles), int(width / (widest + sign))))
    lines = max(sum(1 + label.count("\n") for label in labels[i::columns]) for i in range(columns))
    figure.set_figheight(figure.get_figheight() + LINE * 1.35 * lines + 0.1)
    figure.legend(handles, labels, loc="outside lower center", ncol=columns, frameon=False, columnspacing=1.2)


def wrapped(text: str, inches: float, points: float = SMALL) -> str:
    """Text in lines that are no wider; they end at a blank, an underscore or the like, else anywhere."""
    lines = [""]
    for word in re.split(r"(?<=[\s_/.-])|(?<=[a-z]{3})(?=[A-Z])", text):
        for part in [word] if _width(word.rstrip(), points) <= inches else word:
            if lines[-1] and _width((lines[-1] + part).rstrip(), points) > inches:
                lines.append("")
            lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


@lru_cache(maxsize=4096)
def _width(line: str, points: float = SMALL) -> float:
    """Inches that a line of text takes."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    with _style():
        width: float = text_to_path.get_text_width_height_descent(line, FontProperties(size=points), ismath=False)[0]
    return width / 72
