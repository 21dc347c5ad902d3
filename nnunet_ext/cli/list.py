"""Show every registered trainer, planner and architecture, and the names that can't be used, with the reason.

example: nnunet-ext list --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from nnunet_ext import registry
from nnunet_ext.printable import printable
from nnunet_ext.registry import Entry

SCHEDULES = (
    "Schedules: every trainer here, and nnUNetTrainer, takes a suffix [_<N>epochs][_<M>iters][_NoMirroring], "
    "e.g. -tr nnUNetTrainer_20epochs_50iters: N epochs of M training iterations."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext list``."""
    parser.add_argument("--json", action="store_true", help="print the records as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the names; return the exit status."""
    entries = [entry for kind in registry.KINDS for entry in registry.entries(kind)]
    if args.json:
        print(json.dumps([{**asdict(entry), "summary": registry.summary(entry)} for entry in entries], indent=2))
    else:
        print(text(entries))
    return 0


def text(entries: Sequence[Entry]) -> str:
    """Table of usable names by kind, then the refused ones, then how schedules are asked for."""
    usable = [entry for entry in entries if not entry.refused]
    refused = [entry for entry in entries if entry.refused]
    lines: list[str] = []
    for kind in registry.KINDS:
        rows = [(entry.name, entry.distribution, registry.summary(entry)) for entry in usable if entry.kind == kind]
        lines += [kind, *_aligned(rows or [("none", "", "")]), ""]
    if refused:
        lines += ["refused", *_aligned([(e.name, e.distribution, e.refused) for e in refused]), ""]
    return "\n".join([*lines, SCHEDULES])


def _aligned(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [
        printable(f"  {first:<{widths[0]}}  {second:<{widths[1]}}  {third}".rstrip()) for first, second, third in rows
    ]
