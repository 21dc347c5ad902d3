"""Runs console commands of nnU-Net: their environment, their log, their end and that of all that they start."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from nnunet_ext import console
from nnunet_ext.demo.settings import FULL_SCHEDULE, Demo
from nnunet_ext.errors import UsageError
from nnunet_ext.files import writing

_MARK = "nnUNet_ext_demo"  # variable that names the demo in the environment of its processes
_KEPT = 8000  # characters at the end of the output
_LOW_DISK = 100 * 2**20  # bytes
_GRACE = 10.0  # seconds that processes have to end


class CommandError(UsageError):
    """A command failed; the message holds the command, its exit code and the end of its log."""


def environment(demo: Demo) -> dict[str, str]:
    """Return the user's environment with the demo's folders; what else is set is only a default."""
    own = {name: str(folder) for name, folder in demo.variables.items()}
    own |= {"PYTHONUNBUFFERED": "1", "nnUNet_wandb_enabled": "0", _MARK: os.path.realpath(demo.root)}
    # Compiling the network takes longer than a short training.
    defaults = {} if demo.schedule == FULL_SCHEDULE else {"nnUNet_compile": "f"}
    if demo.device != "cuda":  # more processes than cores slow a training without a GPU down
        defaults |= {"nnUNet_n_proc_DA": "2", "nnUNet_def_n_proc": "2"}
    return defaults | dict(os.environ) | own


def processes(root: Path) -> list[psutil.Process]:
    """Living processes that the commands of a demo are or have started, also those whose parents have ended."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # ended meanwhile, or somebody else's
            if process.environ().get(_MARK) == os.path.realpath(root):
                found.append(process)
    return found


def run(command: list[str], log: Path, demo: Demo, on_text: Callable[[str], None]) -> None:
    """Run a command to its end; all that it has started ends with it where it fails or this is interrupted.

    Args:
        command: Name of a console command and its arguments.
        log: File that its output is appended to.
        demo: Demo that it belongs to.
        on_text: Gets the end of its output, a few times a second.

    Raises:
        CommandError: the command failed.
        UsageError: the command or its log can't be opened.
    """
    variables, text, status = environment(demo), "", None
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("ab")
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
    with output, log.open(encoding="utf-8", errors="replace") as written:
        written.seek(output.tell())
        process = subprocess.Popen(
            console.arguments(command, variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,  # Ctrl-C reaches the demo, which ends them all
        )
        try:
            while status is None:
                with suppress(subprocess.TimeoutExpired):
                    status = process.wait(timeout=0.4)
                text = (text + written.read())[-_KEPT:]
                on_text(text)
        finally:
            if status != 0:
                _end_all(demo.root)
                with suppress(subprocess.TimeoutExpired):  # not even a kill ends one that waits for a device
                    process.wait(timeout=_GRACE)
    if status:
        raise CommandError(_failure(command, status, log, text))


def _end_all(root: Path) -> None:
    """End all processes of a demo, politely at first; a second interruption only makes it quicker."""
    try:
        _end(root, psutil.Process.terminate)
    finally:
        _end(root, psutil.Process.kill)


def _end(root: Path, end: Callable[[psutil.Process], None]) -> None:
    """Call `end` on all living processes until none is left or the time is over: one may start another meanwhile."""
    limit = time.monotonic() + _GRACE
    while (alive := processes(root)) and time.monotonic() < limit:
        for process in alive:
            with suppress(psutil.Error):
                end(process)
        time.sleep(0.1)


def _failure(command: list[str], status: int, log: Path, text: str) -> str:
    end = f"signal {-status}" if status < 0 else f"exit code {status}"
    end += " (out of memory?)" if status == -9 else ""
    free = shutil.disk_usage(log.parent).free
    disk = f" The disk of {log.parent} has only {free // 2**20} MB left." if free < _LOW_DISK else ""
    tail = [f"\n  | {line.rstrip()}" for line in text.splitlines() if line.strip()][-12:]
    return f"`{shlex.join(command)}` ended with {end}.{disk} Log {log}, its end:{''.join(tail)}"
