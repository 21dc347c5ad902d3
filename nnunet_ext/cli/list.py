"""Show every registered trainer, planner and architecture, and the names that can't be used, with the reason.

example: nnunet-ext list --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from nnunet_ext import methods, registry
from nnunet_ext.printable import printable
from nnunet_ext.registry import Entry

SCHEDULES = (
    "Schedules: every trainer here, and nnUNetTrainer, takes a suffix [_<N>epochs][_<M>iters][_NoMirroring], "
    "e.g. -tr nnUNetTrainer_20epochs_50iters: N epochs of M training iterations."
)
MISSING, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
_HEADER = (
    "method",
    "architecture",
    "trainers",
    "planner",
    "parameters",
    "memory held",
    "memory peak",
    "step time",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext list``."""
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print the records as JSON")
    shape.add_argument(
        "--markdown", action="store_true", help="print the README's table of this package's methods"
    )


def run(args: argparse.Namespace) -> int:
    """Print the names; return the exit status."""
    if args.markdown:
        print(markdown())
        return 0
    entries = [entry for kind in registry.KINDS for entry in registry.entries(kind)]
    if args.json:
        print(
            json.dumps([{**asdict(entry), "summary": registry.summary(entry)} for entry in entries], indent=2)
        )
    else:
        print(text(entries))
    return 0


def text(entries: Sequence[Entry]) -> str:
    """Table of usable names by kind, then the refused ones, then how schedules are asked for."""
    usable = [entry for entry in entries if not entry.refused]
    refused = [entry for entry in entries if entry.refused]
    lines: list[str] = []
    for kind in registry.KINDS:
        rows = [
            (entry.name, entry.distribution, registry.summary(entry))
            for entry in usable
            if entry.kind == kind
        ]
        lines += [kind, *_aligned(rows or [("none", "", "")]), ""]
    if refused:
        lines += ["refused", *_aligned([(e.name, e.distribution, e.refused) for e in refused]), ""]
    return "\n".join([*lines, SCHEDULES])


def _aligned(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [
        printable(f"  {first:<{widths[0]}}  {second:<{widths[1]}}  {third}".rstrip())
        for first, second, third in rows
    ]


def markdown() -> str:
    """One row for each architecture of this package; the README holds it between its ``methods`` markers."""
    rows = [_HEADER, tuple("---" for _ in _HEADER)]
    for method in methods.methods():
        if not method.architecture.distribution.startswith("nnunet-ext "):
            continue
        numbers = method.measured
        rows.append(
            (
                method.name,
                f"`{method.architecture.name}`",
                _code(method.trainers),
                _code(method.planners),
                *map(_ratio, (numbers.parameters, numbers.held, numbers.peak, numbers.step_time)),
            )
        )
    return "\n".join(printable(f"| {' | '.join(row)} |") for row in rows)


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or MISSING


def _ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}{TIMES}"
