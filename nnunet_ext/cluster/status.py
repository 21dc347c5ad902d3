"""How far a cross-validation is, by its files, its jobs and what these say."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nnunet_ext.cluster import slurm
from nnunet_ext.cluster.job import is_done
from nnunet_ext.cluster.request import CrossValidation
from nnunet_ext.cluster.states import STOP, State, log_of, read_job, read_state
from nnunet_ext.cluster.step import Step
from nnunet_ext.cluster.steps import make_steps
from nnunet_ext.cluster.training import Training
from nnunet_ext.cluster.work import is_held
from nnunet_ext.cluster.worker import living_workers, without_needs

What = Literal["done", "running", "queued", "failed", "blocked", "stopped", "not started"]
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


def rows(output: Path) -> list[Row]:
    """How far each step is.

    Raises:
        UsageError: the folder is none of a cross-validation, or Slurm does not answer.
    """
    steps = make_steps(CrossValidation.read(output))
    look = _Look(output, [*steps])
    found = {name: look.at(step) for name, step in steps.items()}
    blocked = without_needs(steps.values(), {name for name, row in found.items() if row.what == "failed"})
    for name in blocked:
        if found[name].what in ("queued", "stopped", "not started"):
            missing = next(need for need in steps[name].needs if need in blocked)
            found[name] = Row(step=steps[name], what="blocked", text=f"needs {steps[missing].title}")
    return list(found.values())


class _Look:
    """Asks Slurm and the workers once, then looks at each step."""

    def __init__(self, output: Path, names: list[str]) -> None:
        self.output = output
        self.jobs = {name: read_job(output, name) for name in names}  # before the queue: a later job is in no older one
        self.queue = slurm.queue() if any(self.jobs.values()) else {}
        self.has_workers = bool(living_workers(output))
        self.is_stopped = (output / STOP).exists()

    def at(self, step: Step) -> Row:
        """How far a step is."""
        if is_done(self.output, step):
            return Row(step=step, what="done")
        state, job = read_state(self.output, step.name), self.jobs[step.name]
        what = "" if state is None else state.what
        # A lock that several steps share is held by one of them.
        is_running = is_held(step.lock) and (what == "running" or isinstance(step, Training))
        queued = (self.queue or {}).get(job or "")
        if state is not None and what == "failed" and not is_running:
            return Row(step=step, what="failed", text=state.message)
        if queued is not None and queued[0] != "RUNNING" and slurm.is_alive(queued, state):
            again = "again, " if what in ("requeued", "running") else ""
            return Row(step=step, what="queued", text=f"{again}{queued[0].lower()} ({queued[1]})")
        if is_running or (queued is not None and queued[0] == what.upper() == "RUNNING"):
            return _running(step, state)
        if queued is not None and queued[0] == "RUNNING":
            return Row(step=step, what="running", text=f"job {job} begins")
        if self.is_stopped or what == "stopped":
            return Row(step=step, what="stopped")
        return self._idle(step, state, job)

    def _idle(self, step: Step, state: State | None, job: str | None) -> Row:
        """A step that nothing does now: what was to do it is gone without a word, or nobody was."""
        can_tell = job is None or self.queue is not None  # not every machine can ask Slurm
        if can_tell and (job is not None or (state is not None and state.what == "running")):
            where = f" on {state.host}" if state is not None else ""
            who, log = f"job {job}" if job else "its worker", log_of(self.output, step.name)
            text = f"{who}{where} ended without a word (killed, cancelled, or the node is lost); log: {log}"
            return Row(step=step, what="failed", text=text)
        return Row(step=step, what="queued" if self.has_workers else "not started")


def _running(step: Step, state: State | None) -> Row:
    host = state.host if state is not None else "another process"
    progress = step.progress if isinstance(step, Training) else None
    if progress is None:
        return Row(step=step, what="running", text=host)
    is_validating = progress.is_validating
    return Row(
        step=step,
        what="running",
        text=f"validating, {host}" if is_validating else host,
        epoch=progress.epoch,
        epochs=progress.epochs,
        seconds_left=None if is_validating else progress.seconds_left,
    )


def wait(output: Path, show: Callable[[list[Row]], None]) -> list[Row]:
    """Look until nothing runs and nothing waits any more; return how it ended.

    Raises:
        UsageError: the folder is none of a cross-validation.
    """
    while True:
        try:
            found = rows(output)
        except slurm.NoAnswerError:  # it will
            time.sleep(_PAUSE)
            continue
        show(found)
        if not any(row.what in ("running", "queued") for row in found):
            return found
        time.sleep(_PAUSE)
