"""Starts what is missing of a cross-validation, and stops it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from nnunet_ext.cluster import local, slurm
from nnunet_ext.cluster.job import is_done
from nnunet_ext.cluster.planning import Planning
from nnunet_ext.cluster.request import CrossValidation
from nnunet_ext.cluster.states import (
    STOP,
    State,
    all_jobs,
    forget,
    log_of,
    read_job,
    read_state,
    write_job,
    write_state,
)
from nnunet_ext.cluster.step import Step
from nnunet_ext.cluster.steps import make_steps
from nnunet_ext.cluster.work import end_command
from nnunet_ext.cluster.worker import living_workers
from nnunet_ext.files import locked, write_text, writing


def start_on_slurm(asked: CrossValidation, cluster: slurm.Slurm, say: Callable[[str], None]) -> int:
    """Submit all steps that are not done and have no job, each after the jobs of what it needs.

    Returns:
        Number of jobs.

    Raises:
        UsageError: Slurm is not here, does not answer, or refuses one.
    """
    cluster.check()
    with _opened(asked) as steps:
        there, jobs = slurm.queue() or {}, {}
        for step in steps.values():
            if is_done(asked.output, step):
                continue
            job = read_job(asked.output, step.name)
            if job is not None and slurm.is_alive(there.get(job), read_state(asked.output, step.name)):
                jobs[step.name] = job
                continue
            needed = [jobs[name] for name in (*step.needs, *step.after) if name in jobs]
            jobs[step.name] = cluster.submit(asked, step, needed)
            write_job(asked.output, step.name, jobs[step.name])
            say(f"job {jobs[step.name]}: {step.dataset}, {step.title}")
        return len(jobs)


def start_here(asked: CrossValidation, groups: Sequence[Sequence[str]]) -> list[int]:
    """Start workers of this machine, unless they live or nothing is left to do; return the numbers of the new ones.

    Args:
        asked: What they work on.
        groups: GPUs of each worker.

    Raises:
        UsageError: one did not start, those that live have other GPUs, or the file system has no locks.
    """
    with _opened(asked, lambda: local.check(asked, groups)) as steps:
        if all(is_done(asked.output, step) for step in steps.values()):
            return []
        return local.start(asked, groups)


@contextmanager
def _opened(asked: CrossValidation, check: Callable[[], None] = lambda: None) -> Iterator[Mapping[str, Step]]:
    """Hold the output folder for a moment, so that two calls don't start the same; forget what is not so any more."""
    asked.check()
    with writing(asked.output):
        asked.output.mkdir(parents=True, exist_ok=True)
    with locked(asked.output / "start.lock"):
        check()
        asked.open()
        (asked.output / STOP).unlink(missing_ok=True)
        steps = make_steps(asked)
        for step in steps.values():
            _refresh(asked.output, step)
        yield steps


def _refresh(output: Path, step: Step) -> None:
    """Let a step that failed be done again, and look once whether what is said of planning is so."""
    state, is_planning = read_state(output, step.name), isinstance(step, Planning)
    if is_planning and step.is_done():
        write_state(output, step.name, State(what="done"))
    elif state is not None and state.what in ("failed", "stopped", *["done"] * is_planning):
        forget(output, step.name)


def stop(output: Path) -> str:
    """End all that runs and cancel all that waits; what is done stays, and a later call goes on.

    Returns:
        A sentence that says what was ended.

    Raises:
        UsageError: the folder is none of a cross-validation, or Slurm does not answer.
    """
    asked = CrossValidation.read(output)
    write_text(output / STOP, "")
    submitted = all_jobs(output)
    there = (slurm.queue() or {}) if submitted else {}
    jobs = [job for job in submitted if job in there]
    if jobs:
        slurm.cancel(jobs)
    workers = living_workers(output)
    left = 0 if workers else _end_what_workers_left(asked)
    told = [f"jobs cancelled: {len(jobs)}"] if jobs else []
    told += [f"workers that end in a moment: {len(workers)}"] if workers else []
    told += [f"commands ended that a killed worker had left: {left}"] if left else []
    return f"Stopped; {', '.join(told) or 'nothing was running'}."


def _end_what_workers_left(asked: CrossValidation) -> int:
    """End commands on this machine whose worker was killed: nobody else tells them to."""
    return sum(end_command(step.lock, log_of(asked.output, name)) for name, step in make_steps(asked).items())
