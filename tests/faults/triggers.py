"""Where a process of a training is ended: at a byte of a checkpoint, at a step of its saving, at a call of Python."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

_FILES = ("open", "os.", "shutil.")  # audit events of work on files


class Trigger:
    """Does nothing; what a training calls where something can happen."""

    ticks = 0

    def begin(self) -> None:
        """The trainer is made."""

    def epoch(self, trainer: Any) -> None:
        """An epoch begins."""

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A checkpoint is saved."""
        yield

    @contextmanager
    def ending(self) -> Iterator[None]:
        """The training ends: the final checkpoint is saved, the latest deleted."""
        yield


def die() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


class Limited(Trigger):
    """Files can't grow beyond a size while a save lasts: the error that the system gives is that of a disk with quota.

    Args:
        save: Which save of this process, from 0.
        size: Bytes.
    """

    def __init__(self, save: int, size: int) -> None:
        self.save, self.size, self._saves = save, size, 0

    @contextmanager
    def saving(self) -> Iterator[None]:
        is_it = self._saves == self.save
        self._saves += 1
        if is_it:
            self.limit(self.size)
        yield
        if is_it:
            self.limit(resource.RLIM_INFINITY)

    def limit(self, size: int) -> None:
        """Set the largest size of a file, in bytes."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class AtByte(Limited):
    """End the process when the file of a save grows beyond a size: the system does it, inside of the write."""

    def limit(self, size: int) -> None:
        """Set the size, and let the signal end the process, as SIGKILL would; Python ignores it."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        super().limit(size)


class AtTick(Trigger):
    """End the process at a step on files: those that Python tells its audit hooks, before and after each fsync.

    Args:
        save: Which save of this process, from 0; None: the end of the training.
        tick: Which step, from 1; 0 counts them only.
    """

    def __init__(self, save: int | None, tick: int) -> None:
        self.save, self.tick, self._saves, self._is_on = save, tick, 0, False

    def begin(self) -> None:
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_on and event.startswith(_FILES):
            self._count()

    def _count(self) -> None:
        self.ticks += 1
        if self.ticks == self.tick:
            die()

    @contextmanager
    def _armed(self, is_it: bool) -> Iterator[None]:
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            self._count()
            sync(descriptor)
            self._count()

        if not is_it:
            yield
            return
        self.ticks, self._is_on = 0, True
        try:
            with patch.object(os, "fsync", fsync):
                yield
        finally:
            self._is_on = False

    @contextmanager
    def saving(self) -> Iterator[None]:
        with self._armed(self._saves == self.save):
            yield
        self._saves += 1

    @contextmanager
    def ending(self) -> Iterator[None]:
        with self._armed(self.save is None):
            yield


class AtCall(Trigger):
    """End the process at a call of any function of Python or C, counted from the first epoch.

    Args:
        call: Which, from 1.
    """

    def __init__(self, call: int) -> None:
        self.call, self._calls = call, 0

    def epoch(self, trainer: Any) -> None:
        if sys.getprofile() is None:
            sys.setprofile(self._hear)

    def _hear(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            self._calls += 1
            self.ticks = self._calls
            if self._calls == self.call:
                die()


class AtEpoch(Trigger):
    """End the process when an epoch begins, so that those before are saved.

    Args:
        at: Epoch.
    """

    def __init__(self, at: int) -> None:
        self.at = at

    def epoch(self, trainer: Any) -> None:
        if trainer.current_epoch == self.at:
            die()


class Slow(Trigger):
    """Wait where an epoch begins, so that something can happen from outside.

    Args:
        since: First epoch.
    """

    def __init__(self, since: int) -> None:
        self.since = since

    def epoch(self, trainer: Any) -> None:
        if trainer.current_epoch >= self.since:
            time.sleep(1)


class OtherProcess(Trigger):
    """End another process when an epoch begins.

    Args:
        at: Epoch.
        choose: Gives its number, of the trainer.
    """

    def __init__(self, at: int, choose: Any) -> None:
        self.at, self.choose = at, choose

    def epoch(self, trainer: Any) -> None:
        if trainer.current_epoch == self.at:
            os.kill(self.choose(trainer), signal.SIGKILL)
