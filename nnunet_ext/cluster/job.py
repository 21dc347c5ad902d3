"""A step as a job of submitit, on Slurm or done by a worker of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnunet_ext.cluster.planning import Planning
from nnunet_ext.cluster.request import CrossValidation
from nnunet_ext.cluster.states import STOP, State, log_of, read_state, write_state
from nnunet_ext.cluster.step import Step
from nnunet_ext.cluster.steps import make_steps
from nnunet_ext.cluster.training import Training
from nnunet_ext.cluster.work import Commands, StepError, StoppedError, held

_REQUEUED = 120.0  # seconds that the processes of an earlier run of a job may still need to end
_PLANNED = 7 * 86400.0  # seconds to wait for another planner of the same data set
_DATA = "nnUNet_preprocessed"
_MOST_WORKERS = {"cuda": 12}  # as nnU-Net; elsewhere more processes than two slow the training itself down


@dataclass(frozen=True, kw_only=True)
class Means:
    """What a job has to do its step with.

    Args:
        device, gpus: What trains, and how many of them.
        cores: CPU cores.
        limit: Seconds after which the job is ended; None without a limit.
        notice: Seconds before the limit at which it is told.
        variables: Environment of its commands in addition to this process's own.
    """

    device: str
    gpus: int
    cores: int
    limit: float | None = None
    notice: float = 0.0
    variables: Mapping[str, str] = field(default_factory=dict)

    def workers(self) -> dict[str, str]:
        """Processes of nnU-Net, which takes those of all cores of a machine where the user has not said how many."""
        augmenting = min(self.cores - 1, _MOST_WORKERS.get(self.device, 2))
        said = {"nnUNet_n_proc_DA": max(1, augmenting), "nnUNet_def_n_proc": min(self.cores, 8)}
        return {name: os.environ.get(name) or str(value) for name, value in said.items()}


class StepJob:
    """One step; a job that Slurm starts again goes on with it.

    Args:
        output: Folder of the cross-validation.
        name: Name of the step.
        means: What it is done with.
    """

    def __init__(self, output: Path, name: str, means: Means) -> None:
        self.output, self.name, self.means = output, name, means
        self._step: Step | None = None
        self._commands: Commands | None = None
        self._began = 0.0
        self._before: tuple[str, int] | None = None  # mark of the training when the job began

    def __reduce__(self) -> tuple[Any, ...]:
        """Submitit pickles it: no more than what it is called with, so that later versions can read it."""
        return StepJob, (self.output, self.name, self.means)

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
        try:
            asked = CrossValidation.read(self.output)
            steps = make_steps(replace(asked, device=self.means.device, gpus=self.means.gpus))
            if self.name not in steps:
                raise StepError("the plans that were made have no such stage: leave it out, in another folder by -o")
            self._step = step = steps[self.name]
            with held(step.lock, _PLANNED if isinstance(step, Planning) else wait) as lock:
                if lock is None:
                    return False
                self._say(State(what="running"))
                self._do(step, steps, lock)
                self._say(State(what="done"))
        except StoppedError as error:
            self._say(State(what="stopped"))
            raise StepError(str(error)) from error
        except Exception as error:  # whatever it is, the others go on, and status says so
            message = str(error) if isinstance(error, StepError | ValueError | OSError) else repr(error)
            self._say(State(what="failed", message=" ".join(message.split())))
            raise StepError(message) from error
        return True

    def _say(self, state: State) -> None:
        write_state(self.output, self.name, state)

    def _do(self, step: Step, steps: Mapping[str, Step], lock: int) -> None:
        missing = [name for name in step.needs if not is_done(self.output, steps[name])]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise StepError(f"it needs {steps[missing[0]].title}{more}, which is not done")
        if step.is_done():
            return
        variables = {**step.asked.variables, **self.means.workers(), **self.means.variables}
        if isinstance(step, Training):
            self._before = step.mark()
            # A command of --setup may have copied the data to a disk of the node.
            variables[_DATA] = os.environ.get(_DATA) or variables[_DATA]
        log = log_of(self.output, self.name)
        self._commands = Commands(log, variables, lock, lambda: (self.output / STOP).exists())
        step.work(self._commands)
        if not step.is_done():
            raise StepError(f"it ended without an error and without all results; log: {log}")

    def checkpoint(self) -> Any:
        """What submitit submits again when the job is preempted, or about to reach its time limit.

        Raises:
            StepError: the time was all that it could have, and it has got nowhere.
        """
        from submitit.helpers import DelayedSubmission

        step, limit = self._step, self.means.limit
        if isinstance(step, Training) and self._commands is not None:
            step.save(self._time_to_save())  # what runs meanwhile Slurm ends
        is_late = limit is not None and time.monotonic() - self._began > 0.5 * (limit - self.means.notice)
        if is_late and not (isinstance(step, Training) and step.mark() != self._before):
            raise StepError(
                f"it reached its limit of {(limit or 0) / 60:.0f} min and has saved nothing: give more --time"
            )
        self._say(State(what="requeued"))
        return DelayedSubmission(self)

    def _time_to_save(self) -> float:
        """Seconds until the limit, less those that ending and submitting take; of a preempted job there are fewer."""
        return self.means.notice - min(20.0, self.means.notice / 3)


def is_done(output: Path, step: Step) -> bool:
    """Whether a step is done, by its files; by its word where all cases of a data set would have to be looked for."""
    state = read_state(output, step.name) if isinstance(step, Planning) else None
    return (state is not None and state.what == "done") or step.is_done()
