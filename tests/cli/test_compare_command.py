"""``nnunet-ext compare``: what it finds, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunet_ext import cli
from tests.comparison.conftest import MakeRun, counted_once, make_run, random_folds, undrawn

__all__ = ["counted_once", "make_run", "undrawn"]  # the fixtures


pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def results(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs below nnUNet_results; the current folder is empty."""
    make_run("nnUNetTrainer_3epochs", random_folds(1))
    make_run("nnUNetTrainerReversible_3epochs", random_folds(2, 0.05))
    for name in ("raw", "preprocessed"):
        monkeypatch.delenv(f"nnUNet_{name}", raising=False)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "results" / "Dataset007_Toy"


NAMES = ["-d", "7", "-tr", "nnUNetTrainer_3epochs", "nnUNetTrainerReversible_3epochs", "-np", "1"]


def test_table_verdict_and_place_of_the_report_are_printed(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *NAMES]) == 0
    output = capsys.readouterr()
    assert "nnUNetTrainerReversible, cross-validation: mean Dice" in " ".join(output.out.split())
    assert output.out.splitlines()[-1] == "Report: comparison/report.html"
    assert {path.name for path in Path("comparison").iterdir()} == {
        "report.html",
        "report.md",
        "report.json",
        "cases.csv",
        "figures",
        "tables",
    }


def test_figures_alone_are_written_where_they_are_asked_for(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *NAMES, "--figures", "-o", "paper"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Figures: paper"
    assert {path.suffix for path in Path("paper").iterdir()} == {".png", ".svg", ".pdf"}


def test_figures_alone_leave_no_report_to_print() -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", "--figures", "--json"])


def test_json_is_the_report_and_nothing_else(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *NAMES, "--json", "-o", "out"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads(Path("out/report.json").read_text())
    assert [run["label"] for run in content["runs"]] == ["nnUNetTrainer", "nnUNetTrainerReversible"]
    reversible = content["runs"][1]["cost"]
    assert reversible["parameters"] > 0
    assert reversible["peak"] > 0


def test_report_holds_the_call_but_not_where_it_was_written(results: Path) -> None:
    assert cli.main(["compare", *NAMES, "-o", "somewhere"]) == 0
    text = Path("somewhere/report.md").read_text()
    assert f"nnunet-ext compare {' '.join(NAMES)}\n" in text
    assert "somewhere" not in text


def test_runs_are_given_by_their_folders_without_any_variable(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("nnUNet_results")
    assert cli.main(["compare", "-m", *map(str, sorted(results.iterdir())), "--names", "default", "ours"]) == 0
    assert "ours, cross-validation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "what to compare must be given"),
        (["-d", "9"], "-d must be one data set in"),
        (["-d", "7", "-tr", "nnUNetTrainerNot"], "-tr needs runs that lie in"),
        ([*NAMES, "-f", "4"], "-f needs validated folds, fold_4 of"),
        ([*NAMES, "--margin", "-1"], "--margin must be 0 or more"),
        ([*NAMES, "--surface"], "--surface needs every segmentation and its reference"),
        ([*NAMES, "-pred", "nowhere", "-ref", "."], "-pred and -ref need existing folders, got nowhere"),
        ([*NAMES, "--benchmark", "none.json"], "none.json is missing"),
        ([*NAMES, "--names", "one"], "--names needs 2 different names"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    results: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnunet-ext compare: ")
    assert message in error
    assert error.count("\n") == 1
    assert not Path("comparison").exists()


def test_half_written_summary_is_one_line(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = results / "nnUNetTrainer_3epochs__nnUNetPlans__3d_fullres" / "fold_0" / "validation" / "summary.json"
    path.write_text(path.read_text()[:-30])
    assert cli.main(["compare", *NAMES]) == 2
    assert str(path) in capsys.readouterr().err
