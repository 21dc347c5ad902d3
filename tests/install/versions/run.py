"""One row: what has passed is kept in its folder, so that the same call goes on where it ended."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from tests.install.lock import REPOSITORY
from tests.install.versions.environment import PRODUCT, CommandError, Environment
from tests.install.versions.matrix import Row, Step

Result = dict[str, Any]
PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"


class NotOfferedError(Exception):
    """The product does not have the command of a step yet."""


def product() -> str:
    """Fingerprint of what is installed: results of another one do not count."""
    names = [name for name in PRODUCT if name != "README.md"]
    files = [path for name in names for path in files_below(REPOSITORY / name)]
    content = hashlib.sha256()
    for path in sorted(files):
        content.update(path.relative_to(REPOSITORY).as_posix().encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:16]


def files_below(path: Path) -> Iterable[Path]:
    """The file itself, or the files of a folder that are installed."""
    return (p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts) if path.is_dir() else [path]


def kept(folder: Path, row: Row, fingerprint: str) -> Result:
    """What the last call left of this row, if that still counts; else a new result."""
    constraints = row.constraints.read_text(encoding="utf-8") if row.constraints else ""
    pins = [*row.pins, *(line for line in constraints.splitlines() if not line.startswith("#"))]
    new: Result = {
        "name": row.name, "why": row.why, "python": row.python, "form": row.form, "pins": pins, "product": fingerprint
    }  # fmt: skip
    path = folder / "result.json"
    if path.is_file():
        last: Result = json.loads(path.read_text(encoding="utf-8"))
        if all(last.get(key) == value for key, value in new.items() if key != "why"):
            return {**last, "why": row.why}
    return {**new, "versions": {}, "steps": {}}


def store(folder: Path, result: Result) -> None:
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run(
    row: Row, steps: Iterable[Step], environment: Environment, fingerprint: str, say: Callable[[str], None]
) -> Result:
    """Do what this row still lacks, in an environment that is made if there is anything to do.

    Args:
        row: which environment.
        steps: what to run in it; those that passed are not run again.
        environment: where it is made.
        fingerprint: of the product.
        say: takes lines of progress.
    """
    environment.folder.mkdir(parents=True, exist_ok=True)
    result = kept(environment.folder, row, fingerprint)
    steps = [] if row.refused else steps
    todo = [step for step in steps if result["steps"].get(step.name, {}).get("status") != PASSED]
    if not todo and result["steps"].get("install", {}).get("status") == PASSED:
        say(f"{row.name}: all passed before")
        return result
    result["date"] = time.strftime("%Y-%m-%d")
    say(f"{row.name}: log {environment.log}")
    if environment.exists() and result["steps"].get("install", {}).get("status") == PASSED:
        environment.copy(row)  # tests may have changed; the product has not
    else:
        install(row, environment, result)
    say(f"{row.name}: {told('install', result)}")
    store(environment.folder, result)
    for step in todo if result["steps"]["install"]["status"] == PASSED else []:
        result["steps"][step.name] = attempt(partial(execute, step, environment))
        say(f"{row.name}: {told(step.name, result)}")
        store(environment.folder, result)
    return result


def install(row: Row, environment: Environment, result: Result) -> None:
    """Make the environment; where it has to be refused, ask pip for it without installing."""
    if row.refused:
        result["steps"]["install"] = attempt(partial(refusal, row, environment))
        return
    result["steps"]["install"] = attempt(partial(environment.create, row))
    if result["steps"]["install"]["status"] == PASSED:
        result["versions"] = environment.versions()
    result["installer"] = "uv" if environment.uv else "pip"


def refusal(row: Row, environment: Environment) -> str:
    """What pip says about a row that it has to refuse.

    Raises:
        CommandError: It did not refuse, or for another reason than the versions that were asked for.
    """
    (pin,) = row.pins
    try:
        environment.create_empty(row)
        environment.resolve(row)
    except CommandError as error:
        conflict = re.search(r"The conflict is caused by:\n((?: .*\n)+)", str(error))
        if conflict and f"The user requested {pin}" in conflict[1]:
            # what pip says once for each nnU-Net that it tried, less a cap that this machine's pip may have of its own
            lines = [line.strip() for line in conflict[1].splitlines() if "(constraint)" not in line]
            return "\n".join(dict.fromkeys(lines))
        raise
    raise CommandError(f"pip takes {pin}, which it has to refuse.")


def execute(step: Step, environment: Environment) -> str:
    """Run a step; return what pytest counted.

    Raises:
        CommandError: It failed.
        NotOfferedError: This product does not have the command.
    """
    if step.offered:
        command, text = step.offered
        if text not in environment.run(*command, minutes=2):
            raise NotOfferedError(f"no {text} in {' '.join(command)}")
    output = environment.run(*step.command, minutes=step.minutes)
    counts = re.findall(r"^=*\s*(\d+ passed.*?) in [\d.]+s", output, re.MULTILINE)
    return counts[-1] if counts else ""


def attempt(call: Callable[[], str | None]) -> Result:
    """Status, seconds and what a call says; the end of the output where it failed."""
    start = time.monotonic()
    try:
        said, status = call() or "", PASSED
    except CommandError as error:
        said, status = str(error), FAILED
    except NotOfferedError as error:
        said, status = str(error), LEFT_OUT
    return {"status": status, "seconds": round(time.monotonic() - start), "said": said}


def told(name: str, result: Result) -> str:
    step = result["steps"][name]
    return f"{name} {step['status']} in {step['seconds']} s" + (f": {step['said']}" if step["said"] else "")
