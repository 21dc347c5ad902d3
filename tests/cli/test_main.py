"""The command ``nnunet-ext`` itself."""

from __future__ import annotations

import errno
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nnunet_ext import __version__, cli
from nnunet_ext.errors import UsageError

if TYPE_CHECKING:
    from tests.conftest import RunPython


@pytest.mark.parametrize("arguments", [["--help"], ["list", "--help"], ["list"], ["list", "--json"], ["--version"]])
def test_answer_needs_no_torch_and_less_than_a_second(run_python: RunPython, arguments: list[str]) -> None:
    # Seconds of this process on the CPU: others on the machine don't count.
    run_python(
        "import sys, time\n"
        "from nnunet_ext.cli import main\n"
        "try:\n"
        f"    status = main({arguments!r})\n"
        "except SystemExit as error:\n"
        "    status = error.code\n"
        "loaded = {'torch', 'nnunetv2', 'numpy', 'SimpleITK', 'matplotlib'} & set(sys.modules)\n"
        "assert not status and not loaded, (status, loaded)\n"
        "assert time.process_time() < 1, time.process_time()\n"
    )


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    assert re.search(rf"examples?:\s+nnunet-ext {command}", capsys.readouterr().out)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_is_a_module(command: str) -> None:
    module = importlib.import_module(f"nnunet_ext.cli.{command.replace('-', '_')}")
    assert callable(module.add_arguments)
    assert callable(module.run)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"nnunet-ext {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["list", "--nothing"]])
def test_wrong_usage_ends_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert "usage: nnunet-ext" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("no such folder"), 2, "no such folder"),
        (UsageError("no \x1b[2J\n"), 2, r"no \x1b[2J\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_mistake_of_the_user_is_one_line(
    error: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr("nnunet_ext.cli.list.run", fail)
    assert cli.main(["list"]) == status
    assert capsys.readouterr().err == f"nnunet-ext list: {line}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), "can't write /out/x: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system"), "can't write its output: Read-only file system"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "No usable temporary directory"),
    ],
)
def test_disk_that_takes_no_more_is_one_line_from_every_command(
    error: OSError, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr("nnunet_ext.cli.list.run", fail)
    assert cli.main(["list"]) == 2
    printed = capsys.readouterr().err
    assert line in printed
    assert printed.count("\n") == 1


def test_other_errors_of_files_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise FileNotFoundError(2, "No such file", "a mistake of ours")

    monkeypatch.setattr("nnunet_ext.cli.list.run", fail)
    with pytest.raises(FileNotFoundError):
        cli.main(["list"])


LIST = [sys.executable, "-c", "from nnunet_ext.cli import main; raise SystemExit(main(['list']))"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_output_to_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(LIST, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "can't write its output: No space left on device" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise")
def test_reader_that_goes_away_is_no_error_message() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(LIST, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 2
