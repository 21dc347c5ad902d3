"""A name is data: whatever structures and runs are called, figures are the same and documents show the name."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_ext import cli
from nnunet_ext.comparison import compare, selection
from nnunet_ext.comparison.accuracy import MEAN
from nnunet_ext.comparison.selection import Selection
from tests.comparison.conftest import DATASET, MakeRun, dice_counts

WORDS = ["mean", "mean of structures", "run", "case", "fold", "structure", "Dice", "TP", "compared", "nan", "None"]
SIGNS = [
    "$x",
    "$\\frac{$",
    "<script>alert(1)</script>",
    "a|b",
    "a\nb",
    "=1+1",
    "_hidden",
    "\N{CJK UNIFIED IDEOGRAPH-809D}",
    "\x1b[31mred",
    "[/red]",
    "long " * 60,
    "\ud800",
    "../../up",
]
RUNS = ["its image", "$A$ <b>|"]


@pytest.fixture
def folders(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two runs of as many structures as there are names."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.delenv(f"nnUNet_{name}", raising=False)
    random = np.random.default_rng(0)
    n = len(WORDS + SIGNS)

    def cases() -> dict[str, Any]:
        return {f"case_{i}": [dice_counts(d) for d in random.uniform(0.5, 0.9, n)] for i in range(4)}

    return [make_run(trainer, {"0": cases()}) for trainer in ("nnUNetTrainer", "nnUNetTrainerB")]


def name_structures(folders: Sequence[Path], names: Sequence[str]) -> None:
    labels = {"background": 0, **{name: i for i, name in enumerate(names, start=1)}}
    for folder in folders:
        (folder / "dataset.json").write_text(json.dumps({**DATASET, "labels": labels}))


def figures(folders: list[Path], names: Sequence[str]) -> list[dict[str, Any]]:
    """All means and differences, with places instead of names."""
    name_structures(folders, names)
    found = compare.compare(selection.request(Selection(folders=folders, processes=1)))
    (evaluation,) = found.evaluations
    places = {MEAN: MEAN, **{name: i for i, name in enumerate(names)}}
    rows = [asdict(row) for row in (*evaluation.means, *evaluation.comparands)]
    return [{**row, "structure": places[row["structure"]]} for row in rows]


def test_structures_called_as_our_words_have_the_figures_of_others(folders: list[Path]) -> None:
    names = WORDS + SIGNS
    plain = figures(folders, [f"structure {i}" for i in range(len(names))])
    np.testing.assert_equal(figures(folders, names), plain)


def test_report_shows_every_name_and_the_mean_beside_it(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = WORDS + SIGNS
    name_structures(folders, names)
    out = tmp_path / "out"
    arguments = ["compare", "-m", *map(str, folders), "-np", "1", "-o", str(out), "--names", *RUNS]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    content = json.loads((out / "report.json").read_text())["evaluations"][0]
    overall = content["mean_of_structures"]
    assert overall == "mean of structures of structures"
    dice = [m for m in content["means"] if (m["run"], m["metric"]) == (RUNS[0], "Dice")]
    assert [m["structure"] for m in dice] == [overall, *names]
    assert dice[0]["mean"] == pytest.approx(np.mean([m["mean"] for m in dice[1:]]))

    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert escape("<script>alert(1)</script>") in page
    assert "\x1b" not in page + (out / "report.md").read_text()

    lines = (out / "report.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| structure |"))
    table = [line.replace("\\|", "").count("|") for line in lines[start : start + 4 + 2 * len(names)]]
    assert set(table) == {9}
    assert not any("<script" in line or line.startswith("=") for line in lines)

    rows = list(csv.DictReader((out / "cases.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 2 * 4 * len(names)
    assert not any(value.startswith(("=", "+", "-", "@")) for row in rows for value in row.values())


def test_cases_of_any_name_are_told_apart(make_run: MakeRun, tmp_path: Path) -> None:
    cases = {name: [dice_counts(0.5), dice_counts(0.6)] for name in ("a:x", "b:x", "%s", "=1", "n" * 200, " ")}
    folders = [make_run(trainer, {"0": cases}) for trainer in ("nnUNetTrainer", "nnUNetTrainerB")]
    found = compare.compare(selection.request(Selection(folders=folders, processes=1)))
    assert set(found.evaluations[0].cases) == set(cases)


def test_a_command_to_copy_quotes_names(make_run: MakeRun) -> None:
    folder = make_run("nnUNetTrainer", {}, plans="$(touch mark)")
    with pytest.raises(Exception, match=r"-p '\$\(touch mark\)' --val"):
        selection.request(Selection(folders=[folder]))
