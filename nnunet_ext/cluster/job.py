"""A step as a job of submitit, and a process that does one step after the other on a machine without a queue."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_ext.cluster.planning import Planning
from nnunet_ext.cluster.request import CrossValidation
from nnunet_ext.cluster.states import STOP, State, forget, log_of, read_state, write_state
from nnunet_ext.cluster.step import Step
from nnunet_ext.cluster.steps import make_steps
from nnunet_ext.cluster.training import Training
from nnunet_ext.cluster.work import Commands, StepError, held, is_held
from nnunet_ext.errors import UsageError
from nnunet_ext.printable import printable

_REQUEUED = 120.0  # seconds that the processes of an earlier run of a job may still need to end
_PLANNED = 7 * 86400.0  # seconds to wait for another planner of the same data set
_PAUSE = 5.0  # seconds between two looks for a step that can be done
DATA = "nnUNet_preprocessed"
_MOST_WORKERS = 12  # that nnU-Net takes by default


class StepJob:
    """One step; a job that Slurm starts again goes on with it.

    Args:
        output: Folder of the cross-validation.
        name: Name of the step.
        cores: CPU cores that it has.
        limit: Seconds after which its job is ended; None without a limit.
        notice: Seconds before the limit at which it is told.
        variables: Environment of its commands in addition to this process's own.
    """

    def __init__(
        self,
        output: Path,
        name: str,
        cores: int,
        limit: float | None = None,
        notice: float = 0.0,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._arguments = (output, name, cores, limit, notice, variables)
        self.output, self.name, self.cores, self.limit, self.notice, self.variables = self._arguments
        self._step: Step | None = None
        self._commands: Commands | None = None
        self._began = 0.0
        self._before: tuple[str, int] | None = None  # mark of the training when the job began

    def __call__(self) -> None:
        """Do the step, unless it is done.

        Raises:
            StepError: it failed, or somebody else does it.
        """
        if not self.run(_REQUEUED):
            raise StepError(f"another process is at work on it, which holds {self._step and self._step.lock}")

    def run(self, wait: float) -> bool:
        """Do the step; False where somebody else does it.

        Args:
            wait: Seconds to wait for whoever does it, such as an earlier run of the job that is about to end.

        Raises:
            StepError: it failed.
        """
        self._began = time.monotonic()
        steps = make_steps(CrossValidation.read(self.output))
        self._step = step = steps[self.name]
        try:
            with held(step.lock, _PLANNED if isinstance(step, Planning) else wait) as lock:
                if lock is None:
                    return False
                write_state(self.output, self.name, State(what="running"))
                self._do(step, steps, lock)
        except (StepError, UsageError, OSError) as error:
            write_state(self.output, self.name, State(what="failed", message=printable(" ".join(str(error).split()))))
            raise StepError(str(error)) from error
        write_state(self.output, self.name, State(what="done"))
        return True

    def _do(self, step: Step, steps: dict[str, Step], lock: int) -> None:
        missing = [name for name in step.needs if not is_done(self.output, steps[name])]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise StepError(f"it needs {steps[missing[0]].title}{more}, which is not done")
        if step.is_done():
            return
        variables = {**step.asked.variables, **self._workers(step), **(self.variables or {})}
        if isinstance(step, Training):
            self._before = step.mark()
            # A command of --setup may have copied the data to a disk of the node.
            variables[DATA] = os.environ.get(DATA) or variables[DATA]
        log = log_of(self.output, self.name)
        self._commands = Commands(log, variables, lock, lambda: (self.output / STOP).exists())
        step.work(self._commands)
        if not step.is_done():
            raise StepError(f"it ended without an error and without all results; log: {log}")

    def _workers(self, step: Step) -> dict[str, str]:
        """What nnU-Net would take of all cores of the machine, where the user has not said it."""
        most = _MOST_WORKERS if step.asked.device == "cuda" else 2  # more than cores slow a training on the CPU
        said = {"nnUNet_n_proc_DA": max(1, min(self.cores - 1, most)), "nnUNet_def_n_proc": min(self.cores, 8)}
        return {name: os.environ.get(name) or str(value) for name, value in said.items()}

    def checkpoint(self) -> Any:
        """What submitit submits again when the job is preempted, or about to reach its time limit.

        Raises:
            StepError: the time was all that it could have, and it has got nowhere.
        """
        from submitit.helpers import DelayedSubmission

        step = self._step
        if isinstance(step, Training) and self._commands is not None:
            step.save(self._time_to_save())  # what runs meanwhile Slurm ends
        is_late = self.limit is not None and time.monotonic() - self._began > 0.5 * (self.limit - self.notice)
        if is_late and not (isinstance(step, Training) and step.mark() != self._before):
            raise StepError(
                f"it reached its limit of {(self.limit or 0) / 60:.0f} min with nothing to go on from: give more --time"
            )
        write_state(self.output, self.name, State(what="requeued"))
        return DelayedSubmission(StepJob(*self._arguments))

    def _time_to_save(self) -> float:
        """Seconds until the limit, less those that ending and submitting take; of a preempted job there are fewer."""
        return self.notice - min(20.0, self.notice / 3)


class Worker:
    """Does the steps of a cross-validation that are ready and that nobody does, until none is left.

    Args:
        output: Folder of the cross-validation.
        number: Number among the workers of the folder.
        cores: CPU cores that it has.
        gpus: GPUs that its trainings see, as in CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, output: Path, number: int, cores: int, gpus: Sequence[str]) -> None:
        self.output, self.number, self.cores, self.gpus = output, number, cores, tuple(gpus)

    def __call__(self) -> None:
        """Work; failed steps are told in their states."""
        with held(lock_of(self.output, self.number)) as lock:
            if lock is None:
                return
            variables = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
            while (step := self._next()) is not None:
                try:
                    StepJob(self.output, step.name, self.cores, variables=variables).run(wait=0)
                except StepError as error:
                    print(f"{step.title}: {error}", flush=True)

    def _next(self) -> Step | None:
        """The first step that can be done; waits while others do what it needs."""
        while not (self.output / STOP).exists():
            steps = make_steps(CrossValidation.read(self.output))
            open_steps = [step for step in steps.values() if not is_done(self.output, step)]
            names = {step.name for step in open_steps}
            failed = {name for name in names if _has_failed(self.output, name)}
            blocked = without_needs(open_steps, failed)
            waiting = [step for step in open_steps if step.name not in blocked]
            for step in waiting:
                if not names.intersection(step.needs) and not is_held(step.lock):
                    return step
            if not waiting:
                return None
            time.sleep(_PAUSE)
        return None


def is_done(output: Path, step: Step) -> bool:
    """Whether a step is done, by its files; by its word where all cases of a data set would have to be looked for."""
    state = read_state(output, step.name) if isinstance(step, Planning) else None
    return (state is not None and state.what == "done") or step.is_done()


def _has_failed(output: Path, name: str) -> bool:
    state = read_state(output, name)
    return state is not None and state.what == "failed"


def without_needs(steps: Iterable[Step], failed: set[str]) -> set[str]:
    """Names of the failed steps, and of all that wait for them in vain."""
    found = set(failed)
    for step in steps:  # each stands after those that it needs
        if found.intersection(step.needs):
            found.add(step.name)
    return found


def lock_of(output: Path, number: int) -> Path:
    """File that is locked while a worker lives."""
    return output / "workers" / f"{number}.lock"


def living_workers(output: Path) -> list[int]:
    """Numbers of the workers that live."""
    paths = sorted((output / "workers").glob("*.lock"))
    return [int(path.stem) for path in paths if is_held(path)]


def forget_failures(output: Path, steps: Iterable[Step]) -> None:
    """Let all steps that failed be done again."""
    for step in steps:
        if _has_failed(output, step.name):
            forget(output, step.name)
