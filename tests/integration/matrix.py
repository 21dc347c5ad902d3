"""Every registered trainer on every data set: what is selected, what is done already, and in which order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from filelock import FileLock, Timeout

import nnunet_ext
from nnunet_ext import aims, registry
from nnunet_ext.aims import DEFAULT
from nnunet_ext.files import write_text
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.protocols import HasTeacher
from tests.integration import commands, forms, plans
from tests.integration.forms import Form, write_raw
from tests.integration.outcome import Outcome
from tests.integration.plans import PLANS, STAGES, STANDARD, is_prepared, prepare, prepare_stages, staged_plans
from tests.integration.scenario import Scenario

NARROW = {"decoder_width": 32}  # attributes of trainers whose networks are no wider than this here

OnCell = Callable[[Scenario, str, Outcome], None]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """What is to be run, and where.

    Args:
        output: Folder of everything: nnU-Net's three folders, logs, results.
        data: Folder of the real data sets; None: phantoms alone.
        forms: Data sets.
        trainers: Trainers.
    """

    output: Path
    data: Path | None
    forms: tuple[Form, ...]
    trainers: tuple[str, ...]

    def scenarios(self, form: Form) -> list[Scenario]:
        """What is run on a data set; the control comes first, whose models teach others."""
        needed = [DEFAULT] if any(isinstance(trainer_class(name), HasTeacher) for name in self.trainers) else []
        names = dict.fromkeys([*needed, *sorted(self.trainers, key=lambda name: name != DEFAULT)])
        routes = [(name, "", PLANS, STANDARD) for name in names]
        for planner, (trainer, own) in staged_plans().items():
            routes += [(name, planner, own, STAGES[planner]) for name in names if trainer in (name, plans_of(name))]
        return [
            Scenario(
                trainer=name,
                form=form,
                planner=planner,
                plans=own,
                configurations=configurations,
                folder=self.output / "nnunet",
                log=self.output / "logs" / form.name / f"{name}-{own}.log",
            )
            for name, planner, own, configurations in routes
        ]

    def run(self, on_cell: OnCell) -> None:
        """Run what is not done yet. A second process with the same folder takes the data sets that no other works on.

        Args:
            on_cell: Gets every cell as it ends.

        Raises:
            UsageError: real data is asked for that is not there.
        """
        busy = [form for form in self.forms if not self._run_form(form, on_cell, wait=False)]
        for form in busy:
            self._run_form(form, on_cell, wait=True)

    def _run_form(self, form: Form, on_cell: OnCell, wait: bool) -> bool:
        """Whether this process got the data set."""
        folder = self.output / "nnunet"
        lock = FileLock(self.output / f"{form.name}.lock")
        try:
            held = lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            return False
        run = partial(commands.run, self.output / "logs" / form.name / "planning.log")
        with held, commands.nnunet_folders(folder), narrow_decoders(self.trainers):
            planned, state = folder / "preprocessed" / form.dataset, planned_by(form)
            if not is_prepared(planned, state):
                write_raw(form, folder / "raw" / form.dataset, self.data)
                prepare(form, planned, state, run)
            for scenario in self.scenarios(form):
                if scenario.planner:
                    prepare_stages(form, planned, scenario.planner, run)
                self._run_scenario(scenario, on_cell)
        return True

    def _run_scenario(self, scenario: Scenario, on_cell: OnCell) -> None:
        done = self.cells(scenario)
        is_control = scenario.trainer == DEFAULT
        if any(outcome.status == "fail" for outcome in done.values()) or (is_control and not scenario.is_trained):
            done = {}
        for step, outcome in scenario.run(done):
            self._write(scenario, done)
            on_cell(scenario, step, outcome)
        scenario.clear()

    def path(self, scenario: Scenario) -> Path:
        """File that holds the cells of a scenario."""
        return self.output / "cells" / scenario.form.name / f"{scenario.trainer}-{scenario.plans}.json"

    def cells(self, scenario: Scenario) -> dict[str, Outcome]:
        """Cells of a scenario that this code has made."""
        path = self.path(scenario)
        if not path.is_file():
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["code"] != code():
            return {}
        return {step: Outcome(**cell) for step, cell in content["cells"].items()}

    def _write(self, scenario: Scenario, done: dict[str, Outcome]) -> None:
        path = self.path(scenario)
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = {step: asdict(outcome) for step, outcome in done.items()}
        write_text(path, json.dumps({"code": code(), "cells": cells}, indent=1))


def plans_of(trainer: str) -> str:
    """Trainer whose planners plan for this one too."""
    method = aims.of(trainer)
    return method.plans_of if method else ""


def all_trainers() -> tuple[str, ...]:
    """The control and everything that is registered."""
    return (DEFAULT, *registry.names("trainers"))


@contextmanager
def narrow_decoders(trainers: Sequence[str]) -> Iterator[None]:
    """Networks that have a width of their own are as narrow as those of the plans."""
    classes = {base for name in trainers for base in trainer_class(name).__mro__}
    patches = [
        patch.object(found, name, value) for found in classes for name, value in NARROW.items() if name in vars(found)
    ]
    for started in patches:
        started.start()
    try:
        yield
    finally:
        for started in patches:
            started.stop()


@cache
def code() -> str:
    """What the results depend on: the package, what runs it, PyTorch and nnU-Net; not what tells them."""
    mine = [path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith(("__", "report", "test_"))]
    sources = [*Path(nnunet_ext.__file__).parent.rglob("*.py"), *mine]
    return _digest(sorted(sources), str(torch.__version__), version("nnunetv2"))


def planned_by(form: Form) -> dict[str, Any]:
    """What raw and preprocessed data depend on."""
    sources = [Path(str(module.__file__)) for module in (forms, plans)]
    return {"form": json.loads(json.dumps(asdict(form))), "code": _digest(sources, version("nnunetv2"))}


def _digest(sources: Sequence[Path], *versions: str) -> str:
    digest = sha256(" ".join(versions).encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
