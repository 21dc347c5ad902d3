"""The result of the matrix: a JSON, and tables in Markdown with one line per trainer."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version

import torch

from nnunet_ext.aims import DEFAULT
from tests.integration.matrix import Matrix, code
from tests.integration.outcome import Outcome
from tests.integration.plans import PLANS
from tests.integration.scenario import Scenario

SHORT = {"3d_fullres": "full", "3d_lowres": "low", "3d_cascade_fullres": "cascade", "inference": "infer"}

Cells = dict[tuple[str, str, str, str], Outcome]  # trainer, form, plans, step


def write_report(matrix: Matrix) -> tuple[str, int]:
    """Write integration.json and integration.md; return the text and how many cells failed."""
    scenarios = [scenario for form in matrix.forms for scenario in matrix.scenarios(form)]
    found = {_key(scenario): matrix.cells(scenario) for scenario in scenarios}
    cells = {(*key, step): outcome for key, of in found.items() for step, outcome in of.items()}
    missing = sum(len(scenario.steps) for scenario in scenarios) - len(cells)
    text = "\n".join([*_head(cells, missing), *_tables(scenarios, cells), *_sentences(cells)]) + "\n"
    (matrix.output / "integration.json").write_text(_json(found), encoding="utf-8")
    (matrix.output / "integration.md").write_text(text, encoding="utf-8")
    return text, sum(outcome.status == "fail" for outcome in cells.values())


def _key(scenario: Scenario) -> tuple[str, str, str]:
    return scenario.trainer, scenario.form.name, scenario.plans


def _json(found: dict[tuple[str, str, str], dict[str, Outcome]]) -> str:
    """A line per trainer and data set."""
    head = {
        "date": str(date.today()),
        "machine": {"cpu_cores": os.cpu_count(), "architecture": platform.machine()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "nnunetv2")}},
        "code": code(),
        "cell": ["status", "text", "seconds"],
    }
    lines = [
        json.dumps({"form": form, "trainer": trainer, "plans": plans, "cells": _rows(cells)})
        for (trainer, form, plans), cells in found.items()
        if cells
    ]
    return json.dumps(head, indent=1)[:-2] + ',\n "scenarios": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def _rows(cells: dict[str, Outcome]) -> dict[str, list[str | float]]:
    return {step: [cell.status, cell.text, cell.seconds] for step, cell in cells.items()}


def _head(cells: Cells, missing: int) -> list[str]:
    counts = Counter(cell.status for cell in cells.values())
    minutes = sum(cell.seconds for cell in cells.values()) / 60
    unfinished = f", {missing} are not run yet" if missing else ""
    return [
        f"{len(cells)} cells: {counts['pass']} pass, {counts['documented']} end in a documented NotImplementedError, "
        f"{counts['fail']} fail{unfinished}; {minutes:.0f} minutes in all. Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, nnU-Net {version('nnunetv2')}, {date.today()}.",
        "",
    ]


def _tables(scenarios: Sequence[Scenario], cells: Cells) -> list[str]:
    """A table for each source of images and file of plans."""
    lines = []
    groups = dict.fromkeys((scenario.form.source.name, scenario.plans) for scenario in scenarios)
    for source, plans in groups:
        chosen = [scenario for scenario in scenarios if (scenario.form.source.name, scenario.plans) == (source, plans)]
        columns = list(dict.fromkeys((scenario.form.kind, step) for scenario in chosen for step in scenario.steps))
        lines += [f"### {source}" + (f", {plans}" if plans != PLANS else ""), ""]
        lines += ["| trainer | " + " | ".join(f"{kind} {SHORT.get(step, step)}" for kind, step in columns) + " |"]
        lines += ["| --- |" + " --- |" * len(columns)]
        for trainer in dict.fromkeys(scenario.trainer for scenario in chosen):
            found = [_mark(cells.get((trainer, f"{source}-{kind}", plans, step)), cells) for kind, step in columns]
            lines += [f"| `{trainer}` | " + " | ".join(found) + " |"]
        lines += [""]
    return lines


def _mark(outcome: Outcome | None, cells: Cells) -> str:
    if outcome is None:
        return ""
    if outcome.status == "pass":
        return "ok"
    number = _numbered(cells).index((outcome.status, outcome.text)) + 1
    return f"no ({number})" if outcome.status == "documented" else f"**FAIL** ({number})"


def _numbered(cells: Cells) -> list[tuple[str, str]]:
    """What cells say that did not pass, each once."""
    return list(dict.fromkeys((cell.status, cell.text) for cell in cells.values() if cell.status != "pass"))


def _sentences(cells: Cells) -> list[str]:
    lines = ["`no`: a NotImplementedError of the package that says what to use instead. " + _best_of_control(cells), ""]
    return [*lines, *(f"{i}. {status}: {text}" for i, (status, text) in enumerate(_numbered(cells), 1))]


def _best_of_control(cells: Cells) -> str:
    ensembles = sum(step == "best" and " and " in cell.text for (*_, step), cell in cells.items())
    best = sum(step == "best" and cell.status == "pass" for (*_, step), cell in cells.items())
    return f"Of {best} best ones, {ensembles} are ensembles; `{DEFAULT}` is the control."
