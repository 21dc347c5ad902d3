"""Does the work of a step: runs commands, watches them, and says in one line why one failed."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN, EWOULDBLOCK
from pathlib import Path

import psutil

from nnunet_ext import console
from nnunet_ext.files import partial, writing
from nnunet_ext.printable import printable

_LOOK = 1.0  # seconds between two looks at a running command
_TREE = 10.0  # seconds between two looks at what it has started
_GRACE = 10.0  # seconds that processes have to end before they are killed
_PROCESS, _COMMAND = 0, 1  # bytes of a lock's file, locked by the process that does a step and by its command
_held_here: set[str] = set()
_one_at_a_time = threading.Lock()
_LOW_DISK = 100 * 2**20  # bytes
_KEPT = 20_000  # bytes at the end of a log in which the error is looked for
_ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit)\b.*|^nnunet-ext \S+: .*", re.MULTILINE)
# What nnU-Net says last where a process that it started has failed: the reason stands above.
_FOLLOWS = ("background workers", "workers died", "ProcessRaisedException", "ProcessExitedException")


class StepError(Exception):
    """A step failed; the message is one line."""


class StoppedError(StepError):
    """The user has stopped the step."""


class CommandKilledError(StepError):
    """A command was ended by a signal.

    Args:
        number: The signal.
        message: One line.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Commands:
    """Runs the commands of one step.

    Args:
        log: File that their output is appended to.
        variables: Environment in addition to this process's own.
        lock: Descriptor of the step's lock, which the commands inherit.
        is_stopped: Whether the user has asked to stop.
    """

    def __init__(self, log: Path, variables: Mapping[str, str], lock: int, is_stopped: Callable[[], bool]) -> None:
        self.log, self.variables, self.lock, self.is_stopped = log, variables, lock, is_stopped
        self._tree: list[psutil.Process] = []  # it, and what it has started

    def run(self, command: Sequence[str], watch: Callable[[], None] = lambda: None) -> None:
        """Run a console command to its end; all that it has started ends where this is interrupted.

        Args:
            command: Name and arguments.
            watch: Called about once a second; what it raises ends the command.

        Raises:
            CommandKilledError: a signal ended it.
            StoppedError: the user has stopped the step.
            StepError: it failed.
        """
        environment = {**os.environ, **self.variables, "PYTHONUNBUFFERED": "1"}
        with writing(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            output = self.log.open("ab")
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
        with output:
            process = subprocess.Popen(
                console.arguments(command, environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(self.lock,),
                preexec_fn=self._prepare,
            )
            self._sign(process)
            try:
                self._wait(process, watch)
            finally:
                self._look_at_tree(process)
                _end(self._tree)
                process.wait()
        status = process.returncode
        if status < 0:
            reason = " (out of memory?)" if -status == signal.SIGKILL else ""
            raise CommandKilledError(-status, f"{command[0]} was ended by {signal.Signals(-status).name}{reason}")
        if status:
            raise StepError(f"{last_error(self.log) or f'{command[0]} ended with exit code {status}'}{self._disk()}")

    def _prepare(self) -> None:
        """In the new process: hold the lock, and don't end by the notice of a time limit.

        Slurm may send it to all processes of a job; it is for the one that does the step.
        """
        _lock(self.lock, _COMMAND)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def _sign(self, process: subprocess.Popen[bytes]) -> None:
        """Say in the lock's file who holds it, for `end_command`."""
        note = {"host": socket.gethostname(), "log": str(self.log), "process": process.pid}
        with suppress(OSError):
            os.ftruncate(self.lock, 0)
            os.pwrite(self.lock, json.dumps(note).encode(), 0)

    def _look_at_tree(self, process: subprocess.Popen[bytes]) -> None:
        """Keep in mind what it has started: of a process that has just been killed nobody knows its children."""
        if process.poll() is None:
            self._tree = [*{*filter(psutil.Process.is_running, self._tree), *_tree(process.pid)}]

    def _wait(self, process: subprocess.Popen[bytes], watch: Callable[[], None]) -> None:
        next_look = 0.0
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_LOOK)
                return
            if self.is_stopped():
                raise StoppedError("stopped by `nnunet-ext cv stop`")
            watch()
            if time.monotonic() > next_look:
                self._look_at_tree(process)
                next_look = time.monotonic() + _TREE

    def _disk(self) -> str:
        roots = {Path(path) for path in self.variables.values() if os.path.isabs(path)} | {self.log.parent}
        low = sorted(str(r) for r in roots if r.is_dir() and shutil.disk_usage(r).free < _LOW_DISK)
        return f" (the disk of {low[0]} is full)" if low else ""


def last_error(log: Path) -> str:
    """The line of a log that says what went wrong: the last error, or the last line; empty where there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _KEPT))
            text = stream.read().decode(errors="replace").rpartition("\n$ ")[2]
    except OSError:
        return ""
    errors = _ERROR.findall(text)
    reasons = [error for error in errors if not any(word in error for word in _FOLLOWS)]
    lines = [line for line in text.splitlines()[1:] if line.strip()]
    return printable(next(iter([*reasons[-1:], *errors[-1:], *lines[-1:]]), "").strip())[:300]


@contextmanager
def held(path: Path, wait: float = 0.0) -> Iterator[int | None]:
    """Hold a lock, of which the commands that inherit it hold a part of their own, as long as they live.

    What a killed job leaves running, such as a training, so keeps others from the same; data loaders that outlive a
    killed training don't: the parts are the operating system's record locks, which no fork inherits. Not
    `files.locked`: it ends with its process. Where the file system has no locks nothing is held.

    Args:
        path: File of the lock; it stays.
        wait: Seconds to wait for whoever holds it.

    Yields:
        Its descriptor; None where somebody else holds it.
    """
    end, descriptor = time.monotonic() + wait, _take(path)
    while descriptor is None and time.monotonic() < end:
        time.sleep(_LOOK)
        descriptor = _take(path)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            _held_here.discard(str(path.resolve()))
            os.close(descriptor)


def _take(path: Path) -> int | None:
    """Open and lock a file; None where it is held, by a process or by a command that one has left."""
    key = str(path.resolve())
    with _one_at_a_time, writing(path):
        if key in _held_here:  # the system would grant it, and let it go where this process closes the file once more
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not (_lock(descriptor, _PROCESS) and _lock(descriptor, _COMMAND)):
            os.close(descriptor)
            return None
        with suppress(OSError):
            fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, _COMMAND)
        _held_here.add(key)
        return descriptor


def _lock(descriptor: int, part: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB, 1, part)
    except OSError as error:
        return error.errno not in (EAGAIN, EWOULDBLOCK, EACCES)
    return True


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock; looking takes none of it from others who look."""
    if str(path.resolve()) in _held_here:
        return True
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not all(_lock(descriptor, part, fcntl.LOCK_SH) for part in (_PROCESS, _COMMAND))
    finally:
        os.close(descriptor)


def has_locks(folder: Path) -> bool:
    """Whether the file system of a folder has locks at all; the folder is made.

    Raises:
        UsageError: it can't be written.
    """
    probe = partial(folder / "lock")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as stream:
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            finally:
                probe.unlink()
    return True


def end_command(lock: Path, log: Path) -> bool:
    """End the command of a step that holds its lock on this machine, though what has started it is gone.

    Args:
        lock: Lock of the step.
        log: Log of the step; another one's command is left alone.

    Returns:
        Whether there was one.
    """
    try:
        note = json.loads(lock.read_text(encoding="utf-8")) if is_held(lock) else {}
    except (OSError, ValueError):
        return False
    if not isinstance(note, dict) or (note.get("host"), note.get("log")) != (socket.gethostname(), str(log)):
        return False
    tree = _tree(int(note["process"]))
    _end(tree)
    return bool(tree)


def _tree(process: int) -> list[psutil.Process]:
    """A process and all that it has started."""
    try:
        parent = psutil.Process(process)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []


def _end(processes: list[psutil.Process]) -> None:
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for one in processes:
            with suppress(psutil.Error):
                end(one)
        _, processes = psutil.wait_procs(processes, timeout=_GRACE)
