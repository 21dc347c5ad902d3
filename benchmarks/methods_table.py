"""Write the README's table of trainers from what `nnunet-ext benchmark -o FOLDER` has measured of all of them.

nnunet-ext benchmark --patch 128 128 128 --repeats 0 -o FOLDER
python benchmarks/methods_table.py FOLDER/benchmark.json README.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nnunet_ext import registry
from nnunet_ext.escaping import markdown_table
from nnunet_ext.files import write_text

BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
# Ratios of a benchmark -> column.
COLUMNS = {
    "parameters": "parameters",
    "held_bytes": "memory held",
    "peak_bytes": "memory peak",
    "step_seconds": "step time",
}


def planners() -> dict[str, list[str]]:
    """Names of the planners of this package, by the trainer that they plan for."""
    found: dict[str, list[str]] = {}
    for name in registry.names("planners"):
        planner = registry.resolve("planners", name)
        if planner.__module__.startswith("nnunet_ext."):
            found.setdefault(planner.trainer, []).append(name)
    return found


def table(benchmark: dict[str, Any]) -> str:
    """One row per trainer: its network, its planners and its ratios to the first row of the benchmark."""
    columns = {
        key: title
        for key, title in COLUMNS.items()
        if any(method["ratios"].get(key) is not None for method in benchmark["methods"])
    }
    by_trainer = planners()
    rows = []
    for method in benchmark["methods"]:
        named = ", ".join(f"`{name}`" for name in by_trainer.get(method["trainer"], []))
        ratios = [method["ratios"].get(key) for key in columns]
        shown = ["\N{EN DASH}" if ratio is None else f"{ratio:.2f}\N{MULTIPLICATION SIGN}" for ratio in ratios]
        rows.append([f"`{method['trainer']}`", f"`{method['network']}`", named or "\N{EN DASH}", *shown])
    return markdown_table(["trainer", "network", "planner", *columns.values()], rows)


def inserted(readme: str, benchmark: dict[str, Any]) -> str:
    """The README with the table between its markers.

    Raises:
        ValueError: it does not have each marker once.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"the README needs one {BEGIN} and one {END}")
    before, after = readme.partition(BEGIN)[0], readme.partition(END)[2]
    return f"{before}{BEGIN}\n{table(benchmark)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("readme", type=Path)
    options = parser.parse_args()
    text = options.readme.read_text(encoding="utf-8")
    write_text(options.readme, inserted(text, json.loads(options.benchmark.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
