"""What compares gradients in a fresh process, and writes a finding for each step."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

import torch

from nnunet_ext.doctor import requirements
from nnunet_ext.doctor.finding import Finding, failure, ok, warning
from nnunet_ext.doctor.gpu import COMPILE
from nnunet_ext.doctor.gradients import patterns, planted, tiny
from nnunet_ext.doctor.gradients.cases import COMBINED, DOUBLE, ORDINARY
from nnunet_ext.doctor.gradients.describe import classes_of
from nnunet_ext.doctor.gradients.gate import Gate, Measured
from nnunet_ext.doctor.gradients.step import Step
from nnunet_ext.doctor.gradients.subjects import Subject, Unbuilt, recomputes, subject_of, subjects
from nnunet_ext.nnunet.teacher import VARIABLE as TEACHER
from nnunet_ext.printable import counted, first_few, typed_line

PATTERNS, SELF_TEST = "patterns of PyTorch", "self-test"
_ANOTHER = "install another version of PyTorch with pip, then repeat this"
_UNCOMPILED = f"export {COMPILE}=f, or {_ANOTHER}"

_MOST = 4  # processes: each imports PyTorch, and holds a context of the GPU


def main(result: str, backend: str) -> None:
    """Write findings as lines of JSON."""
    os.environ.pop(TEACHER, None)  # a trained teacher belongs to plans of its own
    with Path(result).open("w", encoding="utf-8") as file:
        for finding in findings(backend):
            file.write(json.dumps(asdict(finding)) + "\n")
            file.flush()
    os._exit(0)  # what compilers have started is not waited for


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """What is compiled of a step.

    Args:
        backend: Of `torch.compile`.
        only: Kinds of parts; none: nothing is compiled.
        with_autocast: Whether under autocast too.
    """

    backend: str
    only: frozenset[str]
    with_autocast: bool


class _Plan:
    """Chooses what is compiled, which takes longest: in 3D each kind once, under autocast each set of classes once.

    Of a cascade's second stage only what has other classes. 2D and residual encoders are compiled by tests.
    """

    def __init__(self) -> None:
        self._kinds: set[str] = set()
        self._classes: set[str] = set()

    def of(self, subject: Subject, backend: str) -> Compilation:
        only: frozenset[str] = frozenset()
        if subject.configuration == tiny.VOLUME:
            only = subject.kinds - self._kinds
        elif subject.configuration == tiny.CASCADE:
            only = frozenset(kind for kind in subject.kinds if classes_of(kind) not in self._classes)
        classes = set(map(classes_of, only))
        found = Compilation(backend=backend, only=only, with_autocast=not classes <= self._classes)
        self._kinds |= only
        self._classes |= classes
        return found


def findings(backend: str) -> Iterator[Finding]:
    """Compare the gradients of every kind of step that recomputes, several at once where there are cores.

    Args:
        backend: Of `torch.compile`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield _pytorch(device)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_processes(), spawn, initializer=_quiet) as pool:
        jobs: list[tuple[str, Future[Finding | None]]] = [
            (SELF_TEST, pool.submit(_self_test, device, backend)),
            (PATTERNS, pool.submit(_patterns, device, backend)),
        ]
        plan = _Plan()
        for subject in subjects():
            if isinstance(subject, Unbuilt):
                yield warning(subject.name, f"can't be built: {subject.reason}", f"nnunet-ext check {subject.trainer}")
                continue
            place = (subject.trainer, subject.configuration)
            compilation = plan.of(subject, backend)
            jobs.append((subject.name, pool.submit(_compared, *place, device, compilation)))
        yield from _results(jobs)


def _results(jobs: list[tuple[str, Future[Finding | None]]]) -> Iterator[Finding]:
    plain: list[str] = []
    for name, job in jobs:
        try:
            finding = job.result()
        except BrokenProcessPool:
            what = "a process ended by itself while this and others were compared"
            yield failure(name, what, _ANOTHER)
            return
        except Exception as error:
            yield failure(name, f"can't be compared: {typed_line(error)}", _UNCOMPILED)
            continue
        if finding is None:
            plain.append(name)
        else:
            yield finding
    if plain:
        left_out = f"{counted(len(plain), 'step')} without a backward pass of own making"
        yield ok("others", f"{left_out}: {first_few(plain, 2)}")


def _processes() -> int:
    """As many as there are cores, as far as they are worth their start."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST, count))


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _quiet() -> None:
    """Set up a process of the comparison; it ends with the one that started it, which may be killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        Thread(target=_end_after, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)  # tiny networks wait for threads longer than they compute
    # TensorFloat-32 is no part of the comparison.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def _pytorch(device: str) -> Finding:
    """The version that is compared, and whether nnU-Net wants it at all."""
    found = version("torch")
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    asked = requirements.refused_by("nnunetv2", "torch")
    bad = requirements.known_bad("torch", found)
    cure = f'pip install "{asked or "torch!=" + found}"'
    if asked:
        return warning("torch", f"{found} is excluded by nnU-Net, which asks for {asked}; {bad}".rstrip("; "), cure)
    return warning("torch", f"{found} {bad}", cure) if bad else ok("torch", f"{found}, on the {where}")


def _self_test(device: str, backend: str) -> Finding:
    """Whether planted wrong gradients are found."""
    missed = planted.missed(device, backend)
    if missed:
        detail = f"a wrong gradient is not found, or one is found where there is none: {', '.join(missed)}"
        return failure(SELF_TEST, detail, f"do not rely on the rows below; {_ANOTHER}")
    return ok(SELF_TEST, f"a planted wrong gradient is found: {', '.join(planted.PLACES)}")


def _patterns(device: str, backend: str) -> Finding:
    """Whether PyTorch itself treats backward passes of own making rightly."""
    eager = list(patterns.wrong(device, None))
    if eager:
        return failure(PATTERNS, f"wrong gradients: {first_few(eager)}", _ANOTHER)
    compiled = list(patterns.wrong(device, backend))
    count = len(patterns.PATTERNS)
    if compiled:
        detail = f"wrong when compiled, {len(compiled)} of {count}: {first_few(compiled)}"
        return warning(PATTERNS, detail, f"networks of your own that do so: {_UNCOMPILED}; for the others see below")
    return ok(PATTERNS, f"{count} backward passes of own making are right, compiled too")


def _compared(trainer: str, configuration: str, device: str, compilation: Compilation) -> Finding | None:
    """Compare a step; None where it recomputes nothing.

    Args:
        trainer, configuration: Whose step it is.
        device: "cpu" or "cuda".
        compilation: What is compiled of it.
    """
    setting = next(setting for setting in tiny.settings() if setting.configuration == configuration)
    subject = subject_of(trainer, setting)
    if not recomputes(Step(subject.source, DOUBLE, "cpu")):
        return None
    gate = Gate(subject.source, device)
    measured = list(gate.eager(COMBINED))
    wrong = [entry for entry in measured if entry.difference.is_wrong]
    if wrong:
        return failure(subject.name, _told(wrong), f"don't train with it here: {_ANOTHER}")
    backend = compilation.backend if compilation.only else None
    if backend is not None:
        measured += gate.compiled(backend, [ORDINARY], compilation.only, compilation.with_autocast)
        wrong = [entry for entry in measured if entry.difference.is_wrong]
        if wrong:
            return failure(subject.name, _told(wrong), _UNCOMPILED)
    return ok(subject.name, _summary(measured, backend))


def _told(wrong: list[Measured]) -> str:
    first = wrong[0]
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    off, limit = first.difference.value, first.difference.limit
    return f"gradient of {first.difference.name} is off by {off:.1e}, allowed {limit:.0e} ({first.what}){more}"


def _summary(measured: list[Measured], backend: str | None) -> str:
    worst: dict[str, float] = {}
    for entry in measured[1:]:  # after the differences of the loss
        worst[entry.precision] = max(worst.get(entry.precision, 0.0), entry.difference.value)
    shown = ", ".join(f"{value:.0e} in {name}" for name, value in worst.items())
    return f"{shown}{'' if backend is None else f'; compiled by {backend} too'}"
