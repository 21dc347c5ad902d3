"""``nnunet-ext demo``: what it prints, its exit status, and that its defaults are valid."""

from __future__ import annotations

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
from nnunet_ext.demo.commands import CommandError
from nnunet_ext.demo.settings import Demo
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.trainers import trainer_class

Say = Callable[[str, bool], None]
Capture = pytest.CaptureFixture[str]


def train(_: Demo, say: Say) -> None:
    for number in range(3):
        say(f"[2/2] train: epoch {number}/3", False)
        time.sleep(0.15)
    say("[2/2] train: done", True)


@pytest.mark.parametrize(("seconds", "shown"), [(20.0, 1), (0.0, 3)])
def test_how_far_a_step_is_is_printed_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, seconds: float, shown: int
) -> None:
    monkeypatch.setattr(workflow, "run", train)
    monkeypatch.setattr(command, "_SECONDS_BETWEEN_LINES", seconds)
    assert cli.main(["demo"]) == 0
    expected = [f"[2/2] train: epoch {number}/3" for number in range(shown)]
    assert capsys.readouterr().out.splitlines() == [*expected, "[2/2] train: done"]


def test_running_step_rewrites_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(workflow, "run", train)
    assert cli.main(["demo"]) == 0
    erased, *shown = capsys.readouterr().out.split("\r\x1b[K")  # before each
    assert erased == ""
    assert shown == [*(f"[2/2] train: epoch {n}/3" for n in range(3)), "[2/2] train: done\n", ""]


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UsageError("--raw needs a, got b: do c."), 2, "nnunet-ext demo: --raw needs a, got b: do c.\n"),
        (CommandError("its end:\n  | case \x1b[2J"), 1, "nnunet-ext demo: its end:\n  | case \\x1b[2J\n"),
        (KeyboardInterrupt(), 130, "what is done is kept.\nnnunet-ext demo: interrupted\n"),
    ],
)
def test_failure_is_told_and_has_its_status(
    error: BaseException, status: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(workflow, "run", fail)
    assert cli.main(["demo"]) == status
    assert capsys.readouterr().err.endswith(text)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("name", "before", "status"),
    [("SIGTERM", signal.SIG_DFL, 130), ("SIGHUP", signal.SIG_DFL, 130), ("SIGHUP", signal.SIG_IGN, 0)],
)
def test_kill_and_end_of_the_terminal_are_interruptions_unless_under_nohup(
    name: str, before: signal.Handlers, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = signal.Signals[name]
    of_tests = signal.signal(number, before)
    monkeypatch.setattr(workflow, "run", lambda *_: os.kill(os.getpid(), number))
    try:
        assert cli.main(["demo"]) == status
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, of_tests)


def test_arguments_reach_the_workflow_and_defaults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Demo] = []
    monkeypatch.setattr(workflow, "run", lambda demo, _: given.append(demo))
    line = "demo --output /o --raw /x/../r --trainers A B --schedule s -c 2d --device mps"
    cli.main(line.split())
    cli.main(["demo"])
    both, root = ("nnUNetTrainer", "nnUNetTrainerReversible"), Path.cwd() / "demo-output"
    assert given == [
        Demo(root=Path("/o"), raw=Path("/r"), trainers=("A", "B"), schedule="s", configuration="2d", device="mps"),
        Demo(root=root, raw=None, trainers=both, schedule="9epochs_20iters_NoMirroring", configuration="3d_fullres"),
    ]
    for trainer in both:
        trainer_class(given[1].scheduled(trainer))


def test_wrong_data_set_is_one_line_and_status_2(tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["demo", "--raw", str(tmp_path / "Mine"), "--output", str(tmp_path / "demo")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nnunet-ext demo: --raw needs a folder called DatasetXXX_Name")
    assert not (tmp_path / "demo").exists()
