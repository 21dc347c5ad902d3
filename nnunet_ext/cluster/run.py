"""Starts what is missing of a cross-validation, and says how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nnunet_ext.cluster import local, slurm
from nnunet_ext.cluster.job import forget_failures, is_done, living_workers, without_needs
from nnunet_ext.cluster.request import CrossValidation
from nnunet_ext.cluster.states import STOP, State, log_of, read_job, read_state, write_job
from nnunet_ext.cluster.step import Step
from nnunet_ext.cluster.steps import make_steps
from nnunet_ext.cluster.training import Training
from nnunet_ext.cluster.work import is_held
from nnunet_ext.files import locked, write_text, writing

What = Literal["done", "running", "queued", "failed", "blocked", "not started"]
_PAUSE = 2.0  # seconds between two looks of `wait`


@dataclass(frozen=True, kw_only=True)
class Row:
    """How far a step is.

    Args:
        step: The step.
        what: Its state.
        text: What there is to say of it, in one line.
        epoch, epochs: Epochs that have ended and are planned, of a training that runs.
        seconds_left: Until the last epoch ends; None where it can't be told.
    """

    step: Step
    what: What
    text: str = ""
    epoch: int | None = None
    epochs: int | None = None
    seconds_left: float | None = None


def start_on_slurm(asked: CrossValidation, cluster: slurm.Slurm, say: Callable[[str], None]) -> int:
    """Submit all steps that are not done and have no job, each after the jobs of what it needs.

    Returns:
        Number of jobs.

    Raises:
        UsageError: Slurm is not here, or refuses one.
    """
    cluster.check()
    with _opened(asked) as steps:
        there, jobs = slurm.queue() or {}, {}
        for step in steps.values():
            job = read_job(asked.output, step.name)
            if step.is_done():
                continue
            if job in there:
                jobs[step.name] = job
                continue
            needed = [jobs[name] for name in step.needs if name in jobs]
            forget_failures(asked.output, [step])
            jobs[step.name] = cluster.submit(asked.output, step, needed)
            write_job(asked.output, step.name, jobs[step.name])
            say(f"job {jobs[step.name]}: {step.dataset}, {step.title}")
        return len(jobs)


def start_here(asked: CrossValidation, groups: Sequence[Sequence[str]]) -> list[int]:
    """Start workers of this machine, unless they live or nothing is left to do; return the numbers of the new ones.

    Args:
        asked: What they work on.
        groups: GPUs of each worker.

    Raises:
        UsageError: one did not start.
    """
    with _opened(asked) as steps:
        forget_failures(asked.output, steps.values())
        if all(step.is_done() for step in steps.values()):
            return []
        return local.start(asked.output, groups)


@contextmanager
def _opened(asked: CrossValidation) -> Iterator[dict[str, Step]]:
    """Hold the output folder for a moment, so that two calls don't start the same."""
    asked.check()
    with writing(asked.output):
        asked.output.mkdir(parents=True, exist_ok=True)
    with locked(asked.output / "start.lock"):
        asked.open()
        (asked.output / STOP).unlink(missing_ok=True)
        yield make_steps(asked)


def rows(output: Path) -> list[Row]:
    """How far each step is.

    Raises:
        UsageError: the folder is none of a cross-validation.
    """
    steps = make_steps(CrossValidation.read(output))
    look = _Look(output)
    found = {name: look.at(step) for name, step in steps.items()}
    blocked = without_needs(steps.values(), {name for name, row in found.items() if row.what == "failed"})
    for name in blocked:
        if found[name].what in ("queued", "not started"):
            missing = next(need for need in steps[name].needs if need in blocked)
            found[name] = Row(step=steps[name], what="blocked", text=f"needs {steps[missing].title}")
    return list(found.values())


class _Look:
    """Asks Slurm and the workers once, then looks at each step."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.queue = slurm.queue()
        self.has_workers = bool(living_workers(output))

    def at(self, step: Step) -> Row:
        """How far a step is."""
        if is_done(self.output, step):
            return Row(step=step, what="done")
        state, job = read_state(self.output, step.name), read_job(self.output, step.name)
        if self._says(state, "failed") and not is_held(step.lock):
            return Row(step=step, what="failed", text=state.message if state else "")
        queued = (self.queue or {}).get(job or "")
        if queued is not None and queued[0] != "RUNNING":
            again = "again, " if state is not None and state.what in ("requeued", "running") else ""
            return Row(step=step, what="queued", text=f"{again}{queued[0].lower()} ({queued[1]})")
        if is_held(step.lock) or (queued is not None and self._says(state, "running")):
            return _running(step, state)
        if queued is not None:
            return Row(step=step, what="running", text=f"job {job} begins")
        if self._was_lost(state, job):
            return Row(step=step, what="failed", text=self._loss(step, state, job))
        return Row(step=step, what="queued" if self.has_workers else "not started")

    @staticmethod
    def _says(state: State | None, what: str) -> bool:
        return state is not None and state.what == what

    def _was_lost(self, state: State | None, job: str | None) -> bool:
        """Whether something did it, or was to do it, and is gone without a word."""
        is_unknown = job is not None and self.queue is None  # this machine can't ask
        return not is_unknown and (job is not None or self._says(state, "running"))

    def _loss(self, step: Step, state: State | None, job: str | None) -> str:
        where = f" on {state.host}" if state is not None else ""
        who = f"job {job}" if job else "its worker"
        return f"{who}{where} ended without a word (killed, cancelled, or the node is lost); log: " + str(
            log_of(self.output, step.name)
        )


def _running(step: Step, state: State | None) -> Row:
    host = state.host if state is not None else "another process"
    progress = step.progress if isinstance(step, Training) else None
    if progress is None:
        return Row(step=step, what="running", text=host)
    if progress.is_validating:
        return Row(step=step, what="running", text=f"validating, {host}", epoch=progress.epoch, epochs=progress.epochs)
    return Row(
        step=step,
        what="running",
        text=host,
        epoch=progress.epoch,
        epochs=progress.epochs,
        seconds_left=progress.seconds_left,
    )


def wait(output: Path, show: Callable[[list[Row]], None]) -> list[Row]:
    """Look until nothing runs and nothing waits any more; return how it ended."""
    while True:
        found = rows(output)
        show(found)
        if not any(row.what in ("running", "queued") for row in found):
            return found
        time.sleep(_PAUSE)


def stop(output: Path) -> int:
    """End all that runs and cancel all that waits; what is done stays, and a later call goes on.

    Returns:
        Number of Slurm's jobs that were cancelled.

    Raises:
        UsageError: the folder is none of a cross-validation.
    """
    steps = make_steps(CrossValidation.read(output))
    write_text(output / STOP, "")
    there = slurm.queue() or {}
    jobs = [job for name in steps if (job := read_job(output, name)) in there and job is not None]
    if jobs:
        slurm.cancel(jobs)
    return len(jobs)
