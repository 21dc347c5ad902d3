"""One training at a time in the folder of a fold."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nnunet_ext.errors import UsageError
from nnunet_ext.files import writing

LOCK = "training.lock"
_HELD = (errno.EACCES, errno.EAGAIN)  # what a system answers where another process holds the lock
_held_here: set[str] = set()  # the system grants a process what it holds already


@contextmanager
def only_training(folder: Path) -> Iterator[bool]:
    """Hold `folder` for this process; gives False where the file system has no locks, so that nothing is held.

    The lock is one of the operating system's record locks. It ends with its process, however that ends: a requeued
    job takes it over from a killed one. Forked processes don't inherit it, as they would `flock`: data loaders that
    outlive a killed training don't block the next one. It holds between machines where the file system is shared.
    The file stays; without its process it means nothing. Not by filelock, as `files.locked`: its releases before 4
    hand the lock to forked data loaders, none names the holder, and without locks it silently trusts a marker.

    Raises:
        UsageError: another training holds it, or the folder can't be written.
    """
    path = folder / LOCK
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open(path) if str(path.resolve()) not in _held_here else None
    if descriptor is None:
        raise _refusal(path, _holder())
    try:
        has_locks = _take(descriptor, path)
        _held_here.add(str(path.resolve()))
        yield has_locks
    finally:
        _held_here.discard(str(path.resolve()))
        os.close(descriptor)  # gives the lock back


def _open(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with suppress(OSError, AttributeError):  # not the owner; Windows
        os.fchmod(descriptor, path.parent.stat().st_mode & 0o666)  # who may write the folder may train there
    return descriptor


def _take(descriptor: int, path: Path) -> bool:
    try:
        _lock(descriptor)
    except OSError as error:
        if error.errno in _HELD:
            raise _refusal(path, os.read(descriptor, 300).decode(errors="replace")) from None
        return False
    with suppress(OSError):  # a full disk; the name is for messages only
        os.ftruncate(descriptor, 0)
        os.write(descriptor, _holder().encode())
    return True


def _lock(descriptor: int) -> None:
    """Take the lock or raise `OSError`."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 2**30, os.SEEK_SET)  # others can read what stands before
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _refusal(path: Path, holder: str) -> UsageError:
    return UsageError(
        f"one training at a time can write to {path.parent}, {holder or 'another process'} trains there: wait for its "
        f"end or stop it; where that machine is lost for good, delete {path}."
    )
