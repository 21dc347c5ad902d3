"""``nnunet-ext demo``: what it prints, its exit status, and that its defaults are valid."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_ext import cli
from nnunet_ext.cli import demo as command
from nnunet_ext.demo import workflow
from nnunet_ext.demo.errors import ChildError
from nnunet_ext.demo.report import Model, Report
from nnunet_ext.demo.settings import Demo, Settings, check_trainers
from nnunet_ext.demo.workflow import Progress
from nnunet_ext.errors import UsageError

DEMO = Demo(Path("/d"), "Dataset990_CTPhantom", ("nnUNetTrainer",), "3epochs", "3d_fullres", "cpu")
REPORT = Report(Path("/d/report.html"), (Model("nnUNetTrainer", 0.75, 12.5),))
NEWS = (
    Progress(1, 2, "generate the phantom", "reused"),
    Progress(2, 2, "train nnUNetTrainer", "started"),
    Progress(2, 2, "train nnUNetTrainer", "running", "epoch 1/3", 5.0),
    Progress(2, 2, "train nnUNetTrainer", "running", "epoch 2/3", 60.0),
    Progress(2, 2, "train nnUNetTrainer", "finished", "", 99.0),
)


def fake(result: Report | BaseException) -> Callable[..., Report]:
    def run(_: Settings, on_start: Callable[[Demo], None], on_progress: Callable[[Progress], None]) -> Report:
        on_start(DEMO)
        for news in NEWS:
            on_progress(news)
        if isinstance(result, BaseException):
            raise result
        return result

    return run


def test_output_ends_with_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workflow, "run", fake(REPORT))
    assert cli.main(["demo"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Demo in /d",
        "nnUNet_raw, nnUNet_preprocessed, nnUNet_results of the demo lie there; your own are left alone.",
        "Dataset990_CTPhantom, 3d_fullres, 3epochs, cpu: nnUNetTrainer",
        "[1/2] generate the phantom: done by an earlier run",
        "[2/2] train nnUNetTrainer ...",
        "[2/2] train nnUNetTrainer: epoch 2/3, 60 s",
        "[2/2] train nnUNetTrainer: done in 99 s",
        "nnUNetTrainer: Dice 0.750, 12.5 s per epoch",
        "Report: /d/report.html",
    ]


def test_running_step_rewrites_one_line_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(workflow, "run", fake(REPORT))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["demo"]) == 0
    pieces = capsys.readouterr().out.replace("\n", "\r").split("\r")
    assert "[2/2] train nnUNetTrainer: epoch 1/3, 5" in pieces
    assert max(len(piece) for piece in pieces if "[2/2]" in piece) <= 39


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UsageError("--raw needs a, got b: do c."), 2, "nnunet-ext demo: --raw needs a, got b: do c.\n"),
        (ChildError("`x` ended with exit code 3."), 1, "nnunet-ext demo: `x` ended with exit code 3.\n"),
        (ChildError("its end:\n  | case \x1b[2J"), 1, "nnunet-ext demo: its end:\n  | case \\x1b[2J\n"),
        (KeyboardInterrupt(), 130, "nnunet-ext demo: interrupted\n"),
    ],
)
def test_failure_is_told_and_has_its_status(
    error: BaseException,
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(workflow, "run", fake(error))
    assert cli.main(["demo"]) == status
    assert capsys.readouterr().err.endswith(text)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_kill_and_end_of_the_terminal_are_interruptions(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests themselves may run under nohup, where the end of the terminal is ignored.
    before = signal.signal(getattr(signal, number), signal.SIG_DFL)

    def run(*_: Any) -> Report:
        os.kill(os.getpid(), getattr(signal, number))
        time.sleep(10)
        return REPORT

    monkeypatch.setattr(workflow, "run", run)
    try:
        assert cli.main(["demo"]) == 130
        assert signal.getsignal(getattr(signal, number)) is signal.SIG_DFL
    finally:
        signal.signal(getattr(signal, number), before)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def run(*_: Any) -> Report:
        os.kill(os.getpid(), signal.SIGHUP)
        return REPORT

    monkeypatch.setattr(workflow, "run", run)
    try:
        assert cli.main(["demo"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_arguments_reach_the_workflow(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Settings] = []

    def run(settings: Settings, *_: Any) -> Report:
        asked.append(settings)
        return REPORT

    monkeypatch.setattr(workflow, "run", run)
    line = "demo --output o --raw r --trainers A B --schedule s -c 2d --device mps"
    cli.main(line.split())
    assert asked == [Settings(Path("o"), Path("r"), ("A", "B"), "s", "2d", "mps")]


def test_defaults_are_trainers_and_a_schedule_that_nnunet_finds() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([])
    check_trainers(Settings(args.output, None, tuple(args.trainers), args.schedule, args.configuration, None))


def test_wrong_data_set_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--raw", str(tmp_path / "Mine"), "--output", str(tmp_path / "demo")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nnunet-ext demo: --raw needs a folder called DatasetXXX_Name")
    assert not (tmp_path / "demo").exists()
