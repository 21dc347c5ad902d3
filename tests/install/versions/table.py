"""The results of all rows, as JSON and as a table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tests.install.versions.matrix import SHOWN, Row, Step
from tests.install.versions.run import LEFT_OUT, PASSED, Result

HEAD = """# Lowest to newest versions

Written by `make test-versions`. Each row is a new environment. A step has passed unless it says FAILED: with so many
tests, in so many seconds, which depend on what else the machine does; a dash is a step that was not run.

"""
TITLES = {"torch": "PyTorch", "nnunetv2": "nnU-Net", "numpy": "NumPy"}


def write(results: list[Result], rows: Iterable[Row], steps: Iterable[Step], folder: Path) -> None:
    """Write versions.json and versions.md for the rows that have results, in the order of the matrix."""
    order = [row.name for row in rows]
    results = sorted(results, key=lambda result: order.index(result["name"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "versions.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / "versions.md").write_text(HEAD + markdown(results, [step.name for step in steps]), encoding="utf-8")


def markdown(results: list[Result], names: list[str]) -> str:
    """One table of the environments, and what was refused or failed below it."""
    names = ["install", *names]
    titles = ["environment", "Python", *(TITLES[name] for name in SHOWN), "form", *names]
    lines = [titles, ["---"] * len(titles), *(line(result, names) for result in results if result["versions"])]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return table + "".join(about(result) + details(result) for result in results)


def about(result: Result) -> str:
    asked = ", ".join(result["pins"]) or "no version asked for"
    made = f"Python {result['python']}, {asked}, {result.get('installer', 'pip')}, {result.get('date', '')}"
    return f"\n**{result['name']}** ({made}): {result['why']}.\n"


def line(result: Result, names: list[str]) -> list[str]:
    versions = [result["versions"].get(name, "") for name in SHOWN]
    cells = [cell(result["steps"].get(name)) for name in names]
    return [result["name"], result["python"], *versions, result["form"], *cells]


def cell(step: Result | None) -> str:
    """How a step ended: the tests that it counted and its seconds, FAILED, or a dash where it was not run."""
    if step is None or step["status"] == LEFT_OUT:
        return "-"
    if step["status"] != PASSED:
        return "FAILED"
    said = re.sub(r", \d+ deselected", "", step["said"])  # by the options of the step itself
    return ", ".join(filter(None, [said, f"{step['seconds']} s"]))


def details(result: Result) -> str:
    """What pip said of a row that it refused, and the end of each output that failed."""
    steps = result["steps"].items()
    shown = [(name, step) for name, step in steps if step["status"] not in (PASSED, LEFT_OUT)]
    if not result["versions"] and not shown:  # refused, as it has to be
        shown = [*steps]
    return "".join(f"\n{name}:\n\n```\n{step['said'].strip()}\n```\n" for name, step in shown)
