"""A process that does one step after the other, on a machine without a queue."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from nnunet_ext.cluster.job import Means, StepJob, is_done
from nnunet_ext.cluster.request import CrossValidation
from nnunet_ext.cluster.states import STOP, read_state
from nnunet_ext.cluster.step import Step
from nnunet_ext.cluster.steps import make_steps
from nnunet_ext.cluster.work import StepError, held, is_held

_PAUSE = 5.0  # seconds between two looks for a step that can be done
_BEGIN = 20.0  # seconds in which an earlier worker of the number may end


class Worker:
    """Does the steps of a cross-validation that are ready and that nobody does, until none is left.

    Args:
        output: Folder of the cross-validation.
        number: Number among the workers of the folder.
        means: What it has for its steps.
    """

    def __init__(self, output: Path, number: int, means: Means) -> None:
        self.output, self.number, self.means = output, number, means

    def __call__(self) -> None:
        """Work; failed steps are told in their states."""
        with held(lock_of(self.output, self.number), _BEGIN) as lock:
            if lock is None:
                return
            while (step := self._next()) is not None:
                with suppress(StepError):
                    StepJob(self.output, step.name, self.means).run(wait=0)

    def _next(self) -> Step | None:
        """The first step that can be done; waits while others do what it needs."""
        while not (self.output / STOP).exists():
            steps = make_steps(CrossValidation.read(self.output))
            open_steps = [step for step in steps.values() if not is_done(self.output, step)]
            names = {step.name for step in open_steps}
            blocked = without_needs(open_steps, {name for name in names if has_failed(self.output, name)})
            waiting = [step for step in open_steps if step.name not in blocked]
            for step in waiting:
                if not names.intersection(step.needs) and not is_held(step.lock):
                    return step
            if not waiting:
                return None
            time.sleep(_PAUSE)
        return None


def has_failed(output: Path, name: str) -> bool:
    """Whether the last job of a step said so."""
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
    return [int(path.stem) for path in paths if path.stem.isdecimal() and is_held(path)]
