"""The results that README and docs/benchmarks show are those of the committed measurements."""

from __future__ import annotations

import re
from typing import Any

import pytest

from benchmarks import results as script


def test_pages_are_what_was_measured() -> None:
    for page, text in script.pages():
        assert page.read_text(encoding="utf-8") == text, page


def test_default_nnunet_has_learned_where_others_are_compared_with_it() -> None:
    report = script.read(script.latest("learning", "report.json"))
    baseline = script.learned(report)[0]
    assert report["baseline"] == report["runs"][0]["label"]
    assert (baseline.trainer, baseline.plans) == ("nnUNetTrainer", "nnUNetPlans")
    assert baseline.dice > 0.8
    iterations = {run["cost"]["epochs"] * run["cost"]["iterations"] for run in report["runs"]}
    assert len(iterations) == 1
    assert iterations.pop() >= 1000


def test_the_figure_shows_every_training_numbered_as_in_the_table() -> None:
    figure = script.FIGURE.read_text(encoding="utf-8")
    rows = script.learning_table(script.learned(script.read(script.latest("learning", "report.json")))).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    # matplotlib draws text as outlines, and says in a comment what it is
    assert [row[1:3] for row in cells if f"<!-- {row[1]}  {row[2]} -->" not in figure] == []


def run(trainer: str, dice: float, plans: str = "nnUNetPlans_batch2") -> tuple[dict[str, Any], dict[str, Any]]:
    label = f"{trainer}, {plans}"
    cost = {"peak": 2**30, "parameters": 5e6, "macs": 1e9}
    mean = {"run": label, "metric": "Dice", "structure": "mean", "mean": dice}
    return {"label": label, "trainer": f"{trainer}_8epochs_125iters", "plans": plans, "cost": cost}, mean


def test_the_most_accurate_stands_first_with_its_difference() -> None:
    (a, mean_a), (b, mean_b) = run("nnUNetTrainer", 0.8), run("nnUNetTrainerX", 0.9, "nnUNetXPlans_batch2")
    difference = {"run": b["label"], "baseline": a["label"], "metric": "Dice", "structure": "mean"}
    evaluation = {
        "mean_of_structures": "mean",
        "structures": [],
        "means": [mean_a, mean_b],
        "differences": [{**difference, "mean": 0.1, "low": 0.05, "high": 0.15}],
    }
    found = script.learned({"runs": [a, b], "evaluations": [evaluation], "baseline": a["label"]})
    rows = script.learning_table(found).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells == [
        ["2", "X, X", "0.900", "+10.0 (+5.0 to +15.0)", "1.00", "5.00", "1.0"],
        ["1", "default", "0.800", "\N{EN DASH}", "1.00", "5.00", "1.0"],
    ]


def test_figures_are_filled_in_and_a_missing_one_is_said() -> None:
    page = "a <!-- learning:A -->old<!-- / --> b <!-- learning:B -->0.1<!-- / --> <!-- other:A -->x<!-- / -->"
    found = script.filled(page, "learning", {"A": "0.5"}, ["A", "B"])
    assert re.sub(r"<!--.*?-->", "", found) == "a 0.5 b not yet trained x"
    assert script.filled(found, "learning", {"A": "0.5"}, ["A", "B"]) == found
    with pytest.raises(ValueError, match="learning knows no B"):
        script.filled(page, "learning", {}, ["A"])
