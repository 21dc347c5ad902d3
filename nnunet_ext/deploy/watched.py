"""Runs a command and measures it with all of its processes: seconds, processor time, peak host memory."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from nnunet_ext.errors import UsageError
from nnunet_ext.printable import one_line

_FIRST, _SHARE = 0.05, 0.05  # seconds between two looks at the memory: so many, and a share of what has passed


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a command took, start-up included.

    Args:
        seconds: From its start to its end.
        cpu_seconds: Of all processors together.
        peak_bytes: Largest memory of all its processes at one time; what they share counts once.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run(command: Sequence[str], what: str) -> Usage:
    """Run a command to its end.

    Args:
        command: Program and arguments.
        what: What it does, for the error.

    Raises:
        UsageError: it failed; with the last line that it wrote.
    """
    start, before = time.perf_counter(), _spent_by_children()
    process = subprocess.Popen(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    watch = _Watch(process.pid)
    watch.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    watch.ended.set()
    watch.join()
    if process.returncode:
        last = (output.strip().splitlines() or ["it wrote nothing"])[-1]
        raise UsageError(f"{what} failed ({one_line(Exception(last))}): {' '.join(command)}")
    return Usage(seconds=seconds, cpu_seconds=_spent_by_children() - before, peak_bytes=watch.peak)


def _spent_by_children() -> float:
    """Processor time of all processes that this one has started and that have ended, and of theirs."""
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)


class _Watch(threading.Thread):
    """Looks at a process and its children until `ended`."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.peak = 0
        self._root = psutil.Process(pid)

    def run(self) -> None:
        start = time.perf_counter()
        while True:
            with suppress(psutil.Error):
                self.peak = max(self.peak, sum(map(_memory, [self._root, *self._root.children(recursive=True)])))
            if self.ended.wait(min(5.0, _FIRST + _SHARE * (time.perf_counter() - start))):  # a look takes time itself
                return


def _memory(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
        return int(getattr(memory, "pss", memory.rss))  # Linux divides shared pages among those who share them
    except (psutil.Error, OSError):
        return 0
