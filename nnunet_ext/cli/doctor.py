"""Prove that nnU-Net's commands find every registered name, and say what to repair.

Runs nnU-Net's own lookup in a fresh process with the Python of the nnUNetv2_train on PATH. The exit status is
0 where nothing fails; warnings don't count.

example: nnunet-ext doctor --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from nnunet_ext import doctor
from nnunet_ext.doctor.finding import Finding
from nnunet_ext.printable import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext doctor``."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; return 1 where one of them is a failure."""
    findings = doctor.examine()
    print(json.dumps([asdict(finding) for finding in findings], indent=2) if args.json else text(findings))
    return int(any(finding.level == "failure" for finding in findings))


def text(findings: Sequence[Finding]) -> str:
    """One line for each finding, its cure below it, then the count."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        level = finding.level.upper() if finding.level == "failure" else finding.level
        lines.append(printable(f"{level:<7}  {finding.subject:<{width}}  {finding.detail}"))
        if finding.cure:
            lines.append(printable(f"{'':<7}  {'':<{width}}  -> {finding.cure}"))
    counts = {level: sum(finding.level == level for finding in findings) for level in ("failure", "warning")}
    return "\n".join([*lines, "", f"failures: {counts['failure']}, warnings: {counts['warning']}"])
