"""Make every environment, run every step in it, write the table: `make test-versions`.

The same call goes on where it ended; what passed is not run again, unless the package has changed since. An environment
takes about 7 GB while it is there, one at a time; with uv on PATH it is made of links to uv's cache.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from filelock import FileLock

from tests.install.versions import table
from tests.install.versions.environment import Environment
from tests.install.versions.matrix import ROWS, STEPS, Row
from tests.install.versions.pythons import python
from tests.install.versions.run import FAILED, Result, kept, product, run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.install.versions", description=__doc__)
    names = [row.name for row in ROWS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these environments")
    steps = [step.name for step in STEPS]
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps, help="these steps")
    parser.add_argument("--work", type=Path, default=Path(".venv-versions"), help="folder of environments and logs")
    parser.add_argument("--output", type=Path, help="folder of the table (default: that of --work)")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--installer", choices=["uv", "pip"], help="default: uv where it is on PATH")
    return parser.parse_args(arguments)


def say(text: str) -> None:
    print(text, flush=True)


def one(row: Row, options: argparse.Namespace, fingerprint: str) -> Result | None:
    """Run a row; None where this machine has no such Python."""
    base = python(row.python)
    if base is None:
        say(f"{row.name}: no Python {row.python} on PATH, of uv or of pyenv")
        return None
    uv = "" if options.installer == "pip" else shutil.which("uv") or ""
    environment = Environment(folder=options.work / row.name, base=base, uv=uv)
    options.work.mkdir(parents=True, exist_ok=True)
    # a second call of the same row waits, and finds it done
    with FileLock(options.work / f"{row.name}.lock"):
        return locked(row, environment, options, fingerprint)


def locked(row: Row, environment: Environment, options: argparse.Namespace, fingerprint: str) -> Result:
    """Run a row that no other call runs."""
    try:
        steps = [step for step in STEPS if step.name in options.steps]
        return run(row, steps, environment, fingerprint, say)
    finally:
        if not options.keep:
            environment.delete()


def main(arguments: list[str] | None = None) -> int:
    """Do it; return 1 where a step failed or a Python was missing."""
    options = parse(arguments)
    options.work = options.work.resolve()
    fingerprint = product()
    found = [one(row, options, fingerprint) for row in ROWS if row.name in options.only]
    folders = [(row, options.work / row.name) for row in ROWS]
    results = [kept(folder, row, fingerprint) for row, folder in folders if (folder / "result.json").is_file()]
    complete = [result for result in results if result["steps"]]
    table.write(complete, ROWS, STEPS, options.output or options.work)
    statuses = [step["status"] for result in complete for step in result["steps"].values()]
    say(f"steps failed: {statuses.count(FAILED)}; table: {options.output or options.work}/versions.md")
    return int(FAILED in statuses or None in found)


if __name__ == "__main__":
    sys.exit(main())
