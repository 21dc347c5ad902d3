"""What compares gradients in a fresh process, and writes a finding for each step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from nnunet_ext.doctor import requirements
from nnunet_ext.doctor.finding import Finding, failure, ok, warning
from nnunet_ext.doctor.gpu import COMPILE
from nnunet_ext.doctor.gradients import patterns, planted
from nnunet_ext.doctor.gradients.cases import COMBINED, DOUBLE, ORDINARY
from nnunet_ext.doctor.gradients.gate import Gate, Measured
from nnunet_ext.doctor.gradients.step import Step
from nnunet_ext.doctor.gradients.subjects import Subject, Unbuilt, recomputes, subjects
from nnunet_ext.printable import counted, first_few, typed_line

PATTERNS, SELF_TEST = "patterns of PyTorch", "self-test"
_ANOTHER = "install another version of PyTorch with pip, then repeat this"
_UNCOMPILED = f"export {COMPILE}=f, or {_ANOTHER}"

Note = Callable[[str], None]


def main(result: str, backend: str) -> None:
    """Write findings as lines of JSON, and before each what is compared, in case it ends the process."""
    with Path(result).open("w", encoding="utf-8") as file:

        def write(record: dict[str, object]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        for finding in findings(backend, lambda asked: write({"asked": asked})):
            write(asdict(finding))
        file.flush()
    os._exit(0)  # what compilers have started is not waited for


def findings(backend: str, note: Note = lambda asked: None) -> Iterator[Finding]:
    """Compare the gradients of every kind of step that recomputes.

    Args:
        backend: Of `torch.compile`.
        note: Called with what is compared next.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)  # tiny networks wait for threads longer than they compute
    # Their TensorFloat-32 is no part of the comparison.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield _pytorch(device)
    note(SELF_TEST)
    yield _self_test(device, backend)
    note(PATTERNS)
    yield _patterns(device, backend)
    plain: list[str] = []
    compiled: set[str] = set()
    for subject in subjects():
        if isinstance(subject, Unbuilt):
            yield warning(subject.name, f"can't be built: {subject.reason}", f"nnunet-ext check {subject.trainer}")
            continue
        note(subject.name)
        try:
            if not recomputes(Step(subject.source, DOUBLE, "cpu")):
                plain.append(subject.name)
                continue
            yield _compared(subject, device, None if subject.kinds <= compiled else backend)
        except Exception as error:
            yield failure(subject.name, f"can't be compared: {typed_line(error)}", _UNCOMPILED)
        compiled |= subject.kinds
    if plain:
        yield ok(
            "others", f"{counted(len(plain), 'step')} without a backward pass of own making: {first_few(plain, 2)}"
        )


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


def _compared(subject: Subject, device: str, backend: str | None) -> Finding:
    """Compare a step, compiled where a backend is given."""
    gate = Gate(subject.source, device)
    measured = list(gate.eager(COMBINED))
    wrong = [entry for entry in measured if entry.difference.is_wrong]
    if wrong:
        return failure(subject.name, _told(wrong), f"don't train with it here: {_ANOTHER}")
    if backend is not None:
        measured += gate.compiled(backend, [ORDINARY])
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
