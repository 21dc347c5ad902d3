"""The command ``nnunet-ext`` itself."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING

import pytest

from nnunet_ext import __version__, cli
from nnunet_ext.errors import UsageError

if TYPE_CHECKING:
    from tests.conftest import RunPython


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list", "--help"], ["list"], ["list", "--json"], ["--version"]]
)
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


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["list", "--nothing"], ["list", "--json", "--markdown"]]
)
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
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr("nnunet_ext.cli.list.run", fail)
    assert cli.main(["list"]) == status
    assert capsys.readouterr().err == f"nnunet-ext list: {line}\n"
