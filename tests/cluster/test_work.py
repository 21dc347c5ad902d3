from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nnunet_ext.cluster.work import CommandKilledError, Commands, StepError, held, last_error

Script = Callable[[str], str]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """A command of a Python source, by its name."""
    monkeypatch.setattr("nnunet_ext.cluster.work._LOOK", 0.05)
    monkeypatch.setattr("nnunet_ext.console._find", lambda name: str(tmp_path / name))

    def make(source: str) -> str:
        path = tmp_path / "command"
        path.write_text(f"#!{sys.executable}\n{source}\n")
        path.chmod(0o755)
        return path.name

    return make


def commands(tmp_path: Path, lock: int = 0, stop: Callable[[], bool] = lambda: False) -> Commands:
    return Commands(tmp_path / "logs" / "step.log", {"SAID": "here"}, lock, stop)


def test_a_command_gets_its_variables_and_its_output_is_kept(script: Script, tmp_path: Path) -> None:
    commands(tmp_path).run([script("import os; print('it is', os.environ['SAID'])"), "with", "words"])
    assert (tmp_path / "logs" / "step.log").read_text() == "$ command with words\nit is here\n"


def test_an_exit_code_alone_is_an_error(script: Script, tmp_path: Path) -> None:
    with pytest.raises(StepError, match="ended with exit code 3"):
        commands(tmp_path).run([script("raise SystemExit(3)")])


def test_a_signal_is_told(script: Script, tmp_path: Path) -> None:
    with pytest.raises(CommandKilledError, match="ended by SIGTERM") as caught:
        commands(tmp_path).run([script("import os; os.kill(os.getpid(), 15)")])
    assert caught.value.number == signal.SIGTERM


def test_the_notice_of_a_time_limit_does_not_end_a_command(script: Script, tmp_path: Path) -> None:
    commands(tmp_path).run([script("import os; os.kill(os.getpid(), 12)")])


def test_a_watch_that_raises_ends_the_command_and_its_children(script: Script, tmp_path: Path) -> None:
    child = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])"
    )
    name = script(f"{child}; print(child.pid, flush=True); child.wait()")
    log = tmp_path / "logs" / "step.log"

    def watch() -> None:
        if log.read_text().count("\n") == 2:
            raise StepError("seen enough")

    with pytest.raises(StepError, match="seen enough"):
        commands(tmp_path).run([name], watch)
    assert not psutil.pid_exists(int(log.read_text().splitlines()[1]))


def test_a_user_can_stop_a_command(script: Script, tmp_path: Path) -> None:
    with pytest.raises(StepError, match="stopped by"):
        commands(tmp_path, stop=lambda: True).run([script("import time; time.sleep(99)")])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Traceback\nValueError: the rule\nmore text", "ValueError: the rule"),
        ("OSError: full\nRuntimeError: One or more background workers are no longer alive", "OSError: full"),
        ("RuntimeError: One or more background workers are no longer alive.", "RuntimeError: One or more"),
        ("nnunet-ext compare: -m must be", "nnunet-ext compare: -m must be"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to", "torch.OutOfMemoryError: CUDA out of memory."),
        ("only this\n\n", "only this"),
        ("", ""),
    ],
)
def test_the_line_that_says_what_went_wrong_is_found(text: str, reason: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(f"$ earlier\nKeyError: of an earlier command\n$ command\n{text}")
    assert last_error(log).startswith(reason)
    assert bool(last_error(log)) == bool(reason)


_LOCKED = """
import sys
from pathlib import Path
from nnunet_ext.cluster.work import held, is_held
with held(Path(sys.argv[1])) as mine:
    print(mine is not None, is_held(Path(sys.argv[1])), flush=True)
"""


def tried(lock: Path) -> str:
    """What another process finds."""
    command = [sys.executable, "-c", _LOCKED, str(lock)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=_ENVIRONMENT).stdout.strip()


_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
_STARTS = """
import os, sys
from pathlib import Path
import nnunet_ext.console as console
from nnunet_ext.cluster.work import Commands, held
console._find = lambda name: name
with held(Path(sys.argv[1])) as lock:
    Commands(Path(sys.argv[2]), {}, lock, lambda: False).run(sys.argv[3:])
"""


def test_a_lock_outlives_its_process_with_its_command_but_not_with_what_that_has_started(tmp_path: Path) -> None:
    lock, log = tmp_path / "lock", tmp_path / "log"
    loader = "import os, time; pid = os.fork(); print(pid, flush=True) if pid else None; time.sleep(60)"
    words = [sys.executable, "-c", _STARTS, str(lock), str(log), sys.executable, "-c", loader]
    job = subprocess.Popen(words, env=_ENVIRONMENT)
    while not (log.exists() and len(log.read_text().splitlines()) == 2):
        time.sleep(0.05)
    loader_process = psutil.Process(int(log.read_text().splitlines()[1]))
    command = loader_process.parent()
    assert command is not None
    assert tried(lock) == "False True"
    job.kill()
    job.wait()
    assert tried(lock) == "False True"
    command.kill()
    psutil.wait_procs([command], timeout=10)
    try:
        assert loader_process.is_running()
        assert tried(lock) == "True True"
    finally:
        loader_process.kill()


def test_data_loaders_that_outlive_a_killed_command_are_ended(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnunet_ext.cluster.work._TREE", 0.0)
    name = script("import os, time\npid = os.fork()\nif pid: print(pid, flush=True)\ntime.sleep(60)")
    work, log, looks = commands(tmp_path), tmp_path / "logs" / "step.log", []

    def watch() -> None:
        looks.append(log.read_text().count("\n"))
        if looks.count(2) == 2:  # after the loader was there at a look
            psutil.Process(int(log.read_text().splitlines()[1])).parent().kill()

    with pytest.raises(CommandKilledError):
        work.run([name], watch)
    loader = int(log.read_text().splitlines()[1])
    assert not psutil.pid_exists(loader) or psutil.Process(loader).status() == psutil.STATUS_ZOMBIE


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    with held(tmp_path / "lock") as mine:
        assert mine is not None
        start = time.monotonic()
        with held(tmp_path / "lock", wait=1.0) as other:
            assert other is None
        assert time.monotonic() - start >= 1.0
    with held(tmp_path / "lock") as again:
        assert again is not None
