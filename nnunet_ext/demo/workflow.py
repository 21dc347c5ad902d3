"""Runs the steps of a demo and skips those that an earlier run has finished.

A step is finished once its work succeeded and its results are there; a small file in `done/` says so. Before
a step is done again, its marker and those of the steps that build on it are removed. Trainings continue from
their last checkpoint, everything else is redone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from nnunet_ext.demo import children, dataset, phantom, report
from nnunet_ext.demo.errors import ChildError
from nnunet_ext.demo.settings import (
    FULL_SCHEDULE,
    LOCK,
    Demo,
    Settings,
    check_trainers,
    prepare_folder,
    read_json,
    settle,
)
from nnunet_ext.demo.steps import RunCommand, Step, make_steps
from nnunet_ext.files import locked, write_text, writing

Runner = Callable[[children.Child, Callable[[str], None]], None]


@dataclass(frozen=True)
class Progress:
    """News of one step.

    Args:
        number: Number of the step, from 1.
        total: Number of steps.
        title: Title of the step.
        state: "started", "running", "finished", or "reused" where an earlier run has finished it.
        status: How far a running step is.
        seconds: Since the step's start.
    """

    number: int
    total: int
    title: str
    state: Literal["started", "running", "finished", "reused"]
    status: str = ""
    seconds: float = 0.0


def run(
    settings: Settings,
    on_start: Callable[[Demo], None],
    on_progress: Callable[[Progress], None],
    runner: Runner = children.run,
) -> report.Report:
    """Run the demo in `settings.output`, or finish the one that an earlier call began there.

    Args:
        settings: What the user asks for.
        on_start: Called once the settings have been accepted.
        on_progress: Called at the start and end of every step and while it runs.
        runner: Runs a command of nnU-Net.

    Raises:
        ChildError: a command of nnU-Net failed.
        UsageError: the settings, the data set or the folder don't allow it.
    """
    check_trainers(settings)
    raw = None if settings.raw is None else dataset.read_raw(Path(os.path.abspath(settings.raw)))
    output = Path(os.path.abspath(settings.output))
    settings = replace(settings, output=output, raw=raw.folder if raw else None)
    prepare_folder(output)
    with locked(output / LOCK) as lock:
        settings = settle(settings, default_device)
        demo = Demo(
            output,
            raw.folder.name if raw else phantom.NAME,
            tuple(dict.fromkeys(settings.trainers)),
            settings.schedule,
            settings.configuration,
            str(settings.device),
        )
        on_start(demo)
        steps = make_steps(demo, raw, _runs_commands(demo, lock, runner))
        for number, step in enumerate(steps, start=1):
            _do(demo, steps, step, partial(Progress, number, len(steps), step.title), on_progress)
        return report.read(demo)


def default_device() -> str:
    """Return "cuda" where PyTorch finds an NVIDIA GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _runs_commands(demo: Demo, lock: int | None, runner: Runner) -> RunCommand:
    environment = children.environment(demo.variables, demo.device, is_short=demo.schedule != FULL_SCHEDULE)

    def run_command(name: str, command: tuple[str, ...], on_text: Callable[[str], None]) -> None:
        runner(children.Child(command, demo.root / "logs" / f"{name}.log", environment, lock), on_text)

    return run_command


def _do(
    demo: Demo,
    steps: Sequence[Step],
    step: Step,
    progress: Callable[..., Progress],
    on_progress: Callable[[Progress], None],
) -> None:
    """Do `step`, unless it is finished."""
    if _is_finished(demo, step):
        on_progress(progress("reused"))
        return
    for name in _dependents(steps, step.name):
        with writing(_marker(demo, name)):
            _marker(demo, name).unlink(missing_ok=True)
    start = time.monotonic()
    on_progress(progress("started"))
    step.work(lambda status: on_progress(progress("running", status, time.monotonic() - start)))
    if not step.results():
        log = demo.root / "logs" / f"{step.name}.log"
        raise ChildError(f"the step {step.name!r} ended without an error and without its results; log: {log}")
    seconds = time.monotonic() - start
    marker = {"inputs": step.inputs, "seconds": round(seconds, 1)}
    write_text(_marker(demo, step.name), json.dumps(marker, indent=2) + "\n")
    on_progress(progress("finished", "", seconds))


def _marker(demo: Demo, name: str) -> Path:
    return demo.root / "done" / f"{name}.json"


def _is_finished(demo: Demo, step: Step) -> bool:
    marker = _marker(demo, step.name)
    return marker.is_file() and read_json(marker).get("inputs") == list(step.inputs) and step.results()


def _dependents(steps: Sequence[Step], name: str) -> set[str]:
    """`name` and all that builds on it; steps stand in their order."""
    found = {name}
    for step in steps:
        if found & set(step.needs):
            found.add(step.name)
    return found
