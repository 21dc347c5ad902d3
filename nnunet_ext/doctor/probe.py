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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nnunet_ext.doctor import environment
from nnunet_ext.doctor.finding import Finding, failure, ok
from nnunet_ext.installation import DISTRIBUTION
from nnunet_ext.printable import typed_line

SCHEDULE = "_3epochs_7iters"  # no class of nnU-Net ends like this


def main() -> None:
    """Write the findings as JSON to the first file of the command line, what is being looked up to the second.

    The third argument holds, as JSON, what must not be looked up since it ended an earlier process, and how.
    """
    result, asked, fatal = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    found = [asdict(finding) for finding in findings(asked, fatal)]
    result.write_text(json.dumps(found), encoding="utf-8")


def findings(asked: Path, fatal: Mapping[str, str]) -> Iterator[Finding]:
    """Run every check; nnU-Net's lookup comes first after the versions, before anything else is imported."""
    yield from guarded("versions", environment.versions)
    yield from guarded("metadata", environment.metadata)
    try:
        importlib.import_module("torch")
    except Exception as error:
        cause = error.__cause__ or error
        yield failure("torch", f"can't be imported: {typed_line(cause)}", environment.torch_cure(error))
        return
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
    yield from guarded("device", environment.device)


def guarded(subject: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Run a check; what it does not expect becomes its last row."""
    try:
        yield from check()
    except Exception as error:
        yield failure(subject, f"can't be checked: {typed_line(error)}", "repair what the message names")


def lookups(asked: Path, fatal: Mapping[str, str]) -> Iterator[Finding]:
    """Look up every registered name, a schedule, and one name in a spawned process."""
    from nnunet_ext import registry

    found = []
    for entry in (entry for kind in registry.KINDS for entry in registry.entries(kind)):
        subject = f"{entry.kind[:-1]} {entry.name}"
        if entry.refused:
            yield failure(subject, f"refused: {entry.refused}", f"comes from {entry.distribution}")
            continue
        asked.write_text(subject, encoding="utf-8", errors="replace")
        result = (False, fatal[subject]) if subject in fatal else look_up(entry.kind, entry.name)
        finding = _finding(subject, result, entry.distribution)
        found += [entry.name] if entry.kind == "trainers" and finding.level == "ok" else []
        yield finding
    asked.unlink(missing_ok=True)
    name = (found or [registry.CORE_TRAINER])[0] + SCHEDULE
    for subject, (success, detail) in (
        ("schedule", look_up("trainers", name)),
        ("spawned process", _in_spawned_process(name)),
    ):
        yield _finding(subject, (success, f"{name}: {detail}"), DISTRIBUTION)


def _finding(subject: str, result: tuple[bool, str], distribution: str) -> Finding:
    found, detail = result
    if found:
        return ok(subject, detail)
    return failure(subject, detail, environment.lookup_cure(distribution))


def look_up(kind: str, name: str) -> tuple[bool, str]:
    """Look up `name` as nnU-Net does; return whether it is found, and where or why not."""
    try:
        found = SEARCHES[kind](name)
    except BaseException as error:  # modules of others can raise SystemExit or KeyboardInterrupt as well
        return False, typed_line(error)
    if found is None:
        return False, f"nnU-Net finds no {kind[:-1]} of this name"
    return True, f"found as {found.__module__}.{found.__qualname__}"


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


def _in_spawned_process(name: str) -> tuple[bool, str]:
    """Look up a trainer as the workers of distributed training do."""
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(look_up, "trainers", name).result(timeout=600)
    except Exception as error:
        return False, typed_line(error)
