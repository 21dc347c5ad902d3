"""Runs one console command of nnU-Net: its environment, its log, its end and the end of its children."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nnunet_ext.demo.errors import ChildError
from nnunet_ext.errors import UsageError
from nnunet_ext.files import writing

_TAIL_LINES = 12
_LOW_DISK = 100 * 2**20  # bytes
_GRACE = 10.0  # seconds between a polite and a hard end


@dataclass(frozen=True)
class Child:
    """A command to run.

    Args:
        command: Name of a console command and its arguments.
        log: File that its output is appended to.
        environment: Environment of the child.
        lock: Descriptor of the demo's lock, kept open while the child lives.
    """

    command: tuple[str, ...]
    log: Path
    environment: dict[str, str]
    lock: int | None = None


def environment(folders: Mapping[str, Path], device: str, is_short: bool) -> dict[str, str]:
    """Return the user's environment with nnU-Net's folders replaced; what else is set is only a default.

    Args:
        folders: Variable -> folder.
        device: "cpu", "cuda" or "mps"; more processes than cores slow a training without a GPU down.
        is_short: Compiling the network takes longer than such a training.
    """
    own = {name: str(folder) for name, folder in folders.items()}
    own |= {"PYTHONUNBUFFERED": "1", "nnUNet_wandb_enabled": "0"}
    defaults = {"nnUNet_compile": "f"} if is_short else {}
    if device != "cuda":
        defaults |= {"nnUNet_n_proc_DA": "2", "nnUNet_def_n_proc": "2"}
    return defaults | dict(os.environ) | own


def find_command(name: str) -> str:
    """Path of a console command beside the running Python, else on PATH.

    Raises:
        UsageError: it is in neither.
    """
    beside = Path(sys.executable).parent
    found = shutil.which(name, path=str(beside)) or shutil.which(name)
    if found is None:
        raise UsageError(f"{name} is neither in {beside} nor on PATH: install nnunetv2 and nnunet-ext there.")
    return found


def run(child: Child, on_text: Callable[[str], None]) -> None:
    """Run `child` to its end; `on_text` gets what it wrote since the last call, some times a second.

    The child leads a process group of its own, which ends with it, or when this function is interrupted.

    Raises:
        ChildError: the command failed.
        UsageError: the command or its log can't be opened.
    """
    executable = _executable(child)
    with writing(child.log):
        child.log.parent.mkdir(parents=True, exist_ok=True)
        log = child.log.open("ab")
        start = log.tell()
        log.write(f"$ {shlex.join(child.command)}\n".encode())
        log.flush()
    with log:
        process = subprocess.Popen(
            [*executable, *child.command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=child.environment,
            start_new_session=True,
            pass_fds=() if child.lock is None else (child.lock,),
        )
    try:
        _follow(process, child.log, start, on_text)
    finally:
        if process.returncode != 0:
            _stop(process)
    if process.returncode != 0:
        raise ChildError(_failure(child, process.returncode, start))


def _executable(child: Child) -> list[str]:
    """Path of the command; by `nnunet-ext run` where PyTorch is told not to call our hook."""
    if child.environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return [find_command("nnunet-ext"), "run", child.command[0]]
    return [find_command(child.command[0])]


def _follow(process: subprocess.Popen[bytes], log: Path, start: int, on_text: Callable[[str], None]) -> None:
    with log.open("rb") as stream:
        stream.seek(start)
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.4)
            on_text(stream.read().decode("utf-8", errors="replace"))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the child and its own children; a second interruption only makes it quicker."""
    try:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE)
    finally:
        _signal(process, getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
        return
    with suppress(ProcessLookupError, PermissionError):  # macOS: PermissionError for a group of zombies
        os.killpg(process.pid, number)


def _failure(child: Child, status: int, start: int) -> str:
    end = f"exit code {status}" if status >= 0 else f"signal {-status}"
    end += " (out of memory?)" if status == -9 else ""
    with child.log.open("rb") as stream:
        stream.seek(start)
        lines = stream.read().decode("utf-8", errors="replace").replace("\r", "\n").splitlines()
    tail = "\n".join(f"  | {line}" for line in _tail(lines[1:]))
    free = shutil.disk_usage(child.log.parent).free
    disk = f" The disk of {child.log.parent} has only {free // 2**20} MiB left." if free < _LOW_DISK else ""
    return f"`{shlex.join(child.command)}` ended with {end}.{disk} Log {child.log}, its end:\n{tail}"


def _tail(lines: Sequence[str]) -> list[str]:
    return [line.rstrip() for line in lines if line.strip()][-_TAIL_LINES:]
