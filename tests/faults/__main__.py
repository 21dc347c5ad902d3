"""Injects faults into trainings, counts how they ended, and writes faults.json and faults.md."""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

# Threads of these libraries would not be there in forked processes.
for _name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import torch  # noqa: E402

from tests.contract import conftest as phantom  # noqa: E402
from tests.faults.bench import Bench, Undisturbed  # noqa: E402
from tests.faults.classes import CLASSES, LONG  # noqa: E402
from tests.faults.outcome import Outcome, write  # noqa: E402
from tests.faults.processes import run  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("faults-output"))
    parser.add_argument("--short", action="store_true", help="a few faults of each kind")
    parser.add_argument("--only", nargs="*", metavar="CLASS", choices=list(CLASSES), help="; ".join(CLASSES))
    options = parser.parse_args()
    names = options.only or [name for name in CLASSES if not (options.short and name in LONG)]
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="nnunet_ext-faults-"))
    outcomes: dict[str, Outcome] = {}
    known: dict[tuple[str, int], Undisturbed] = {}
    text = ""
    try:
        prepared = run(lambda: phantom.prepare("labels"), folder / "prepare.log")
        if prepared.status:
            raise RuntimeError(prepared.text)
        for name in names:
            outcomes[name] = _inject(name, options.seed, options.short, folder, known)
            text = write(outcomes, options.output, _facts(outcomes, options.seed))  # of a class that took minutes
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        phantom.pytest_unconfigure()
    print(text)
    return int(not all(outcome.is_clean for outcome in outcomes.values()))


def _facts(outcomes: dict[str, Outcome], seed: int) -> dict[str, object]:
    return {
        "date": date.today().isoformat(),
        "seed": seed,
        "faults": sum(outcome.injected.total() for outcome in outcomes.values()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "minutes": round(sum(outcome.seconds for outcome in outcomes.values()) / 60, 1),
    }


def _inject(name: str, seed: int, is_short: bool, folder: Path, known: dict[tuple[str, int], Undisturbed]) -> Outcome:
    """Inject one class; its random numbers are its own, so that a class alone meets the same faults."""
    began = time.monotonic()
    place = folder / name.replace(" ", "-")
    place.mkdir()
    draw = random.Random(f"{seed} {name}")
    outcome = CLASSES[name](
        Bench(folder=place, dataset=phantom.IDS["labels"], draw=draw, is_short=is_short, known=known)
    )
    outcome.seconds = time.monotonic() - began
    shutil.rmtree(place, ignore_errors=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
