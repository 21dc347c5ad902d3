"""What the doctor does in a fresh process: nnU-Net's own lookup of every registered name.

Everything here is caught and becomes a row: the doctor is for environments in which things are broken.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pydoc
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from nnunet_ext.doctor import environment, gpu, owners, requirements
from nnunet_ext.doctor.finding import Finding, failure, ok
from nnunet_ext.installation import DISTRIBUTION
from nnunet_ext.printable import typed_line

SCHEDULE = "_3epochs_7iters"  # no class of nnU-Net ends like this


def main() -> None:
    """Write the findings as JSON to the first file of the command line, what is being looked up to the second.

    The third argument holds, as JSON, what must not be done again since it ended an earlier process, and how.
    """
    result, asked, fatal = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    found = [asdict(finding) for finding in findings(asked, fatal)]
    result.write_text(json.dumps(found), encoding="utf-8")


def findings(asked: Path, fatal: Mapping[str, str]) -> Iterator[Finding]:
    """Run every check; nnU-Net's lookup comes first after the versions, before anything else is imported."""
    yield from guarded("versions", requirements.versions)
    yield from guarded("requirement", requirements.conflicts)
    yield from guarded("metadata", environment.metadata)
    yield from guarded("shadow", lambda: owners.shadowed([*requirements.installed().values()]))
    if "torch" in fatal:
        yield failure("torch", f"importing it {fatal['torch']}", environment.backends_cure())
        return
    asked.write_text("torch", encoding="utf-8")
    try:
        importlib.import_module("torch")
    except Exception as error:
        cause = error.__cause__ or error
        yield failure("torch", f"can't be imported: {typed_line(cause)}", environment.torch_cure(error))
        return
    asked.unlink(missing_ok=True)
    host = environment.host()
    if host.level == "ok":
        rows = list(lookups(asked, fatal))  # first: the hook keeps what goes wrong meanwhile
        yield from environment.hook()
        yield from rows
    else:
        yield host
        yield from environment.hook()
    yield from guarded("collision", environment.collisions)
    yield from guarded("folders", environment.folders)
    asked.write_text("CUDA", encoding="utf-8")
    yield from guarded("CUDA", lambda: gpu.device(f"computing on it {fatal['CUDA']}" if "CUDA" in fatal else ""))
    asked.unlink(missing_ok=True)


def guarded(subject: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Run a check; what it does not expect becomes its last row."""
    try:
        yield from check()
    except Exception as error:
        yield failure(subject, f"can't be checked: {typed_line(error)}", "repair what the message names")


class Looked(NamedTuple):
    """What a lookup came to: where the name is found, or why not and through whom."""

    found: bool
    detail: str
    breaker: str = ""


def lookups(asked: Path, fatal: Mapping[str, str]) -> Iterator[Finding]:
    """Look up every registered name, a schedule, and one name in a spawned process, which starts meanwhile."""
    from nnunet_ext import registry

    spawned = registry.CORE_TRAINER + SCHEDULE
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        job = pool.submit(look_up, "trainers", spawned)
        found = []
        for entry in (entry for kind in registry.KINDS for entry in registry.entries(kind)):
            subject = f"{entry.kind[:-1]} {entry.name}"
            if entry.refused:
                yield failure(subject, f"refused: {entry.refused}", f"comes from {entry.distribution}")
                continue
            asked.write_text(subject, encoding="utf-8", errors="replace")
            fate = fatal.get(subject)
            looked = Looked(False, f"importing it {fate}") if fate else look_up(entry.kind, entry.name)
            found += [entry.name] if entry.kind == "trainers" and looked.found else []
            yield _finding(subject, looked, entry.distribution)
        asked.unlink(missing_ok=True)
        name = (found or [registry.CORE_TRAINER])[0] + SCHEDULE
        yield _finding("schedule", _named(name, look_up("trainers", name)), DISTRIBUTION)
        yield _finding("spawned process", _named(spawned, _result(job)), DISTRIBUTION)


def _named(name: str, looked: Looked) -> Looked:
    return looked._replace(detail=f"{name}: {looked.detail}")


def _result(job: Future[Looked]) -> Looked:
    """What a worker found, as those of distributed training look."""
    try:
        return job.result(timeout=600)
    except Exception as error:
        return Looked(False, typed_line(error))


def _finding(subject: str, looked: Looked, distribution: str) -> Finding:
    if looked.found:
        return ok(subject, looked.detail)
    return failure(subject, looked.detail, environment.lookup_cure(distribution, looked.breaker))


def look_up(kind: str, name: str) -> Looked:
    """Look up `name` as nnU-Net does."""
    try:
        found = SEARCHES[kind](name)
    except BaseException as error:  # modules of others can raise SystemExit or KeyboardInterrupt as well
        return Looked(False, typed_line(error), owners.culprit(error))
    if found is None:
        return Looked(False, f"nnU-Net finds no {kind[:-1]} of this name")
    return Looked(True, f"found as {found.__module__}.{found.__qualname__}")


def _trainer(name: str) -> Any:
    from nnunet_ext.nnunet.trainers import search_host

    found = search_host(name)
    base = importlib.import_module("nnunetv2.training.nnUNetTrainer.nnUNetTrainer").nnUNetTrainer
    if found is not None and not issubclass(found, base):  # before 2.8 the command checks this after its search
        raise TypeError("the requested trainer must inherit from 'nnUNetTrainer'")
    return found


def _planner(name: str) -> Any:
    search = importlib.import_module("nnunetv2.utilities.find_class_by_name").recursive_find_python_class
    return search(os.path.join(_host_folder(), "experiment_planning"), name, "nnunetv2.experiment_planning")


def _architecture(name: str) -> Any:
    from nnunet_ext import registry

    value = next(entry.value for entry in registry.entries("architectures") if entry.name == name)
    registry.resolve("architectures", name)
    # Plans hold the dotted path; nnU-Net locates it like this.
    return pydoc.locate(value.replace(":", "."))


def _host_folder() -> str:
    return str(importlib.import_module("nnunetv2").__path__[0])


SEARCHES: dict[str, Callable[[str], Any]] = {"trainers": _trainer, "planners": _planner, "architectures": _architecture}
