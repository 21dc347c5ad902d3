"""Draw the figure of docs/methods/README.md: memory, weights and operations of all methods, from a counted benchmark.

python benchmarks/methods_figure.py docs/benchmarks/2026-11-29-methods docs/methods/methods.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from nnunet_ext import aims
from nnunet_ext.files import write_bytes
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.style import page, tidy

# Quantity -> title, what it is divided by, aims whose recommended trainer is marked.
PANELS: dict[str, tuple[str, float, tuple[aims.Aim, ...]]] = {
    "peak_bytes": ("Peak memory in training [GB]", GIB, ("context", "memory")),
    "parameters_deployed": ("Weights to ship [millions]", 1e6, ("size",)),
    "macs": ("Operations, predicting [GMAC]", 1e9, ("speed",)),
}
DEFAULT, TAKEN, OTHER = "#999999", "#0072B2", "#A6D3EE"


def drawn(benchmark: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Default nnU-Net, then what stands beside it, without research switches: recommended, rivals, methods."""
    found = {method["trainer"]: method for method in benchmark["methods"] if not method.get("budget")}
    shown = [method for method in aims.METHODS if method.standing != "research" and method.trainer in found]
    rank = {"rival": 2, "method": 3}
    shown.sort(key=lambda m: 0 if m.trainer == aims.DEFAULT else 1 if m.recommended else rank[m.standing])
    return [found[method.trainer] for method in shown]


def svg(benchmark: Mapping[str, Any]) -> bytes:
    """Bars of the quantities side by side; the same benchmark gives the same bytes."""
    methods = drawn(benchmark)
    names = [m["trainer"].removeprefix(aims.DEFAULT) or "default nnU-Net" for m in methods]
    with rc_context({"svg.hashsalt": "methods", "svg.fonttype": "none"}), page(0.6 + 0.2 * len(methods)) as figure:
        axes = figure.subplots(1, len(PANELS), sharey=True)
        for axis, (key, (title, unit, marked)) in zip(axes, PANELS.items(), strict=True):
            taken = {aims.recommended(aim).trainer for aim in marked}
            colours = [
                DEFAULT if m["trainer"] == aims.DEFAULT else TAKEN if m["trainer"] in taken else OTHER for m in methods
            ]
            hatches = ["///" if m["trainer"] in taken else "" for m in methods]
            values = [m[key] / unit for m in methods]
            bars = axis.barh(names, values, color=colours, hatch=hatches, edgecolor="white", linewidth=0.6)
            axis.bar_label(bars, [f"{value:.3g}" for value in values], padding=2, fontsize=7)
            axis.set_title(title)
            axis.set_xlim(0, 1.2 * max(values))
            tidy(axis, "x")
        axes[0].invert_yaxis()
        stream = BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
        return stream.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    write_bytes(options.file, svg(json.loads((options.folder / "benchmark.json").read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
