"""Runs the steps on every kind of data set and makes a finding of each.

nnU-Net must not be imported before `nnunet_ext.check.phantom.workspace` is entered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nnunet_ext import registry
from nnunet_ext.check.phantom import CASES, DataKind
from nnunet_ext.check.steps import STEPS, ContractError, Trial
from nnunet_ext.doctor.finding import Finding, failure, ok
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.printable import one_line

SUBJECT_WIDTH = max(len(f"{case.title}: {title}") for case in CASES for title, *_ in STEPS)
_HOSTS, _OWN = ("torch.", "nnunetv2.", "dynamic_network_architectures."), "nnunet_ext.check."

OnError = Callable[[BaseException], None]


def check(name: str, on_error: OnError = lambda error: None) -> Iterator[Finding]:
    """Check a trainer on every kind of data set; it must be known to nnU-Net or registered.

    Args:
        name: Name of the trainer, as after ``-tr``.
        on_error: Gets each error that a row tells in one line.

    Raises:
        UsageError: no trainer has this name.
    """
    try:
        registry.resolve("trainers", name)
    except registry.RegistryError as error:
        on_error(error)
        yield failure("import", str(error), "repair what the message names, then install its package again")
        return
    except registry.UnknownNameError:
        trainer_class(name)
    for case in CASES:
        yield from check_case(name, case, on_error)


def check_case(name: str, case: DataKind, on_error: OnError = lambda error: None) -> Iterator[Finding]:
    """Run all steps on one kind of data set; what can't go on after a failure is left out."""
    torch.manual_seed(0)
    np.random.seed(0)
    trial = Trial(name, case)
    for step in STEPS:
        cure = (case.ignore and step.cure_of_ignore) or step.cure
        finding = _finding(f"{case.title}: {step.title}", partial(step.run, trial), cure, on_error)
        yield finding
        if finding.level != "ok" and not (step.goes_on and finding.level == "failure"):
            return


def _finding(subject: str, step: Callable[[], str], cure: str, on_error: OnError) -> Finding:
    try:
        return ok(subject, step())
    except ContractError as error:
        return failure(subject, str(error), error.cure)
    except (Exception, SystemExit) as error:
        on_error(error)
        frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
        modules = [str(frame.frame.f_globals.get("__name__")) for frame in frames]
        is_meant = isinstance(error, NotImplementedError) and not modules[-1].startswith(_HOSTS)
        if is_meant and str(error).strip():
            return Finding(level="warning", subject=subject, detail=f"not supported: {one_line(error)}")
        theirs = [f for f, module in zip(frames, modules, strict=True) if not module.startswith((*_HOSTS, _OWN))]
        place = (theirs or frames)[-1]
        where = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
        return failure(subject, f"{where}: {one_line(error)}", cure)
