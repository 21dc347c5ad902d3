"""Which trainer and planner to take for a data set and a GPU: all methods side by side, one choice, its commands.

Every method is planned for the card on shapes, in one or two minutes; nothing is written. Only the data set's
fingerprint is needed (nnUNetv2_extract_fingerprint -d D).

examples: nnunet-ext advise -d 4 --gpu 11
          nnunet-ext advise -d 4 --gpu 11 -c 2d --for memory
          nnunet-ext advise -d 4 --for speed --json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nnunet_ext import aims
from nnunet_ext.cli.terminal import print_table, status_line, width, wrapped

if TYPE_CHECKING:
    from nnunet_ext.advise.choice import Choice
    from nnunet_ext.advise.records import Advice

_MOST_PROCESSES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext advise``."""
    add = parser.add_argument
    add("-d", dest="dataset", metavar="D", required=True, help="data set: number or DatasetXXX_Name")
    add("--gpu", type=float, metavar="GB", help="memory of the card; default: the card here, else nnU-Net's 8")
    add(
        "-c",
        dest="configuration",
        metavar="C",
        help="2d, 3d_fullres or 3d_lowres; default: 3d_fullres, for 2D images 2d",
    )
    add("--for", dest="aim", choices=aims.AIMS, default=aims.AIMS[0], help="what counts (%(default)s)")
    add("--all", dest="everything", action="store_true", help="variants for research too")
    processes = min(os.cpu_count() or 1, _MOST_PROCESSES)
    add("-np", dest="processes", type=int, default=processes, metavar="N", help="processes (%(default)s)")
    add("--json", action="store_true", help="print all figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Plan, choose and print; return the exit status."""
    with contextlib.redirect_stdout(sys.stderr), status_line(sys.stderr) as show:
        show("counting on shapes")
        from nnunet_ext.advise.advise import advise
        from nnunet_ext.advise.choice import choose

        advice = advise(
            args.dataset,
            args.aim,
            gpu=args.gpu,
            configuration=args.configuration,
            everything=args.everything,
            processes=args.processes,
            on_progress=lambda done, total, what: show(f"{done}/{total} {what}"),
        )
        choice = choose(advice)
    if args.json:
        print(json.dumps(_record(advice, choice), indent=2))
    else:
        _print(advice, choice)
    return 0


def _print(advice: Advice, choice: Choice) -> None:
    from nnunet_ext.advise import text
    from nnunet_ext.advise.choice import reasons

    heading, *rest = wrapped(text.title(advice))
    print_table("\n".join([heading, *rest]), text.HEADER, (text.cells(advice, row) for row in advice.rows))
    for paragraph in ("", *text.notes(advice), "", text.verdict(choice), " ".join(reasons(advice, choice)), ""):
        print("\n".join(wrapped(paragraph)))
    for parts in text.Commands(advice, choice.row):
        print(" \\\n    ".join(_folded(parts)))


def _folded(parts: Sequence[str]) -> list[str]:
    """Lines of a command that a shell takes as one."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + len("     \\") < width():
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return lines


def _record(advice: Advice, choice: Choice) -> dict[str, Any]:
    from nnunet_ext.advise.choice import reasons
    from nnunet_ext.advise.text import Commands

    return {
        **{key: getattr(advice, key) for key in ("dataset", "configuration", "target", "gpu", "aim")},
        "recommended": {
            "trainer": choice.row.trainer,
            "planner": choice.row.planner,
            "stay_with_default": choice.row.is_default,
            "reasons": list(reasons(advice, choice)),
            "commands": [" ".join(parts) for parts in Commands(advice, choice.row)],
        },
        "rows": [advice.as_dict(row) for row in advice.rows],
    }
