"""Prove that nnU-Net's commands find every registered name, or check data or gradients; say what to repair.

Runs nnU-Net's own lookup in a fresh process with the Python of the nnUNetv2_train on PATH. With --dataset, reads every
image and label of a data set with nnU-Net's own reader instead. With --gradients, compares on this machine's GPU or
CPU the gradients of every trainer that recomputes with those of plain autograd instead, in about a minute. The exit
status is 0 where nothing fails; warnings don't count.

examples: nnunet-ext doctor --json
          nnunet-ext doctor --dataset 4
          nnunet-ext doctor --gradients
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from nnunet_ext import doctor
from nnunet_ext.cli.terminal import counts, row
from nnunet_ext.doctor import gradients
from nnunet_ext.doctor.finding import Finding
from nnunet_ext.errors import UsageError
from nnunet_ext.printable import counted, printable

_SECONDS_BETWEEN_LINES = 20.0  # where the output is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext doctor``."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--quiet", action="store_true", help="print failures only; nothing where there is none")
    parser.add_argument("--dataset", metavar="D", help="number, name or folder of a raw data set to check")
    parser.add_argument(
        "--gradients",
        nargs="?",
        const=gradients.BACKENDS[0],
        choices=gradients.BACKENDS,
        help="compare gradients with plain autograd, as they are and compiled; inductor takes minutes (default: "
        "aot_eager)",
    )
    parser.add_argument("-np", type=int, metavar="N", help="processes that read the data set; default: as nnU-Net")


def run(args: argparse.Namespace) -> int:
    """Print the findings; return 1 where one of them is a failure."""
    if args.gradients is not None and args.dataset is not None:
        raise UsageError("--gradients and --dataset check different things, got both: call the doctor twice.")
    if args.gradients is not None:
        findings = gradients.examine(args.gradients)
    else:
        findings = doctor.examine() if args.dataset is None else _examine_dataset(args.dataset, args.np)
    failed = [finding for finding in findings if finding.level == "failure"]
    shown = failed if args.quiet else findings
    if args.json:
        print(json.dumps([asdict(finding) for finding in shown], indent=2))
    elif shown:
        print(text(shown))
    return int(bool(failed))


def _examine_dataset(dataset: str, processes: int | None) -> list[Finding]:
    from nnunet_ext.doctor import raw_dataset

    if processes is not None and processes < 1:
        raise UsageError(f"-np must be at least 1, got {processes}: use 1.")
    with contextlib.redirect_stdout(sys.stderr):  # nnU-Net prints while it looks
        folder = raw_dataset.find(dataset)
        last = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal last
            if sys.stderr.isatty() or time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                end = "\r" if sys.stderr.isatty() and done < total else "\n"
                line = printable(f"{folder.name}: {done} of {counted(total, 'case')} read")
                print(line, end=end, file=sys.stderr, flush=True)
                last = time.monotonic()

        return raw_dataset.examine(folder, processes or raw_dataset.default_processes(), show)


def text(findings: Sequence[Finding]) -> str:
    """All findings, then the count."""
    width = max(len(finding.subject) for finding in findings)
    return "\n".join([*(row(finding, width) for finding in findings), "", counts(findings)])
