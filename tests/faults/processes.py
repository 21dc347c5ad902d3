"""Trainings as children of a process that has imported all they need: starting one costs no import."""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LOOK = 0.02  # seconds between two looks at a process
_LEAVE = 20.0  # seconds that what a training has started may outlive it


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a training ended.

    Args:
        status: Exit status, or minus the signal that ended it.
        was_hung: Whether it had to be ended by the harness.
        left: Processes of it that lived on too long; they are ended.
        lingered: Seconds until the last process of it was gone.
        text: What it printed.
    """

    status: int
    was_hung: bool
    left: int
    lingered: float
    text: str

    @property
    def last_line(self) -> str:
        """The line that a user reads first: the last of a traceback."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        return lines[-1] if lines else ""


class Child:
    """A forked process, first of a session of its own.

    Args:
        job: What it does.
        log: File for what it prints.
    """

    def __init__(self, job: Callable[[], object], log: Path) -> None:
        if threading.active_count() != 1:
            raise RuntimeError("a process of several threads must not be forked")
        self.log = log
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            _live(job, log)

    def kill(self, number: int = signal.SIGKILL, whole_group: bool = False) -> None:
        """Send a signal, unless it has ended."""
        with suppress(ProcessLookupError):
            (os.killpg if whole_group else os.kill)(self.process, number)

    def wait(self, limit: float = 180.0, until: Callable[[], bool] | None = None) -> bool:
        """Wait for its end, or for a condition; False where `limit` seconds pass before."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if self._has_ended() or (until is not None and until()):
                return True
            time.sleep(_LOOK)
        return False

    def _has_ended(self) -> bool:
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self, limit: float = 180.0) -> Ended:
        """Wait for its end and for that of all that it has started."""
        was_hung = not self.wait(limit)
        if was_hung:
            self.kill(signal.SIGABRT)  # faulthandler says where it hangs
            self.wait(2)
            self.kill(whole_group=True)
            self.wait(10)
        began = time.monotonic()
        while members(self.process) and time.monotonic() < began + _LEAVE:
            time.sleep(_LOOK)
        lingered, left = time.monotonic() - began, members(self.process)
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(self.process, 0)
        return Ended(
            status=os.waitstatus_to_exitcode(status),
            was_hung=was_hung,
            left=len(left),
            lingered=lingered,
            text=self.log.read_text(errors="replace"),
        )


def members(session: int) -> list[int]:
    """Processes of a session that live."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] not in "ZX":
                    found.append(int(entry))
    return found


def run(job: Callable[[], object], log: Path, limit: float = 180.0) -> Ended:
    """Fork, and wait for the end."""
    return Child(job, log).end(limit)


def _live(job: Callable[[], object], log: Path) -> None:
    """What the child does; it ends as an interpreter does."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a suite in the background ignores
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(output, stream)
        faulthandler.enable()
        status = _outcome(job)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _outcome(job: Callable[[], object]) -> int:
    try:
        job()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        return 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
