"""Seconds, processor time and memory of a command and all that it starts."""

from __future__ import annotations

import sys

import pytest

from nnunet_ext.deploy.watched import run
from nnunet_ext.errors import UsageError

MB = 2**20
HOLD = "import time; held = bytearray({} * 2**20); time.sleep(0.8)"


def test_memory_of_children_counts_and_is_that_of_one_time() -> None:
    child = HOLD.format(60)
    parent = (
        f"import subprocess, sys; held = bytearray(40 * 2**20); subprocess.run([sys.executable, '-c', {child!r}]); "
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    alone = run([sys.executable, "-c", HOLD.format(0)], "nothing").peak_bytes
    found = run([sys.executable, "-c", parent], "two children in turn")
    assert 95 * MB <= found.peak_bytes - alone <= 150 * MB  # one child at a time, not both
    assert found.seconds >= 1.6


def test_processor_time_is_not_that_of_waiting() -> None:
    busy = "import time; start = time.process_time()\nwhile time.process_time() - start < 0.6: pass"
    waiting = run([sys.executable, "-c", "import time; time.sleep(0.6)"], "waiting").cpu_seconds
    assert run([sys.executable, "-c", busy], "busy").cpu_seconds >= 0.55 + waiting / 2


def test_a_command_that_fails_is_told_with_its_last_line() -> None:
    with pytest.raises(UsageError, match=r"fold 0 failed \(ValueError: no image\)"):
        run([sys.executable, "-c", "raise ValueError('no image')"], "fold 0")
