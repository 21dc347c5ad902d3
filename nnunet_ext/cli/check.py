"""Do with a trainer what nnU-Net does, on tiny data, and say what it breaks and how to mend it.

Builds the network from plans, takes a training and a validation step, saves and loads a checkpoint and predicts an
image larger than the patch: in 3D and 2D, on anisotropic patches, with several channels, region-based labels and the
ignore label. NAME may be of any package, with or without a schedule's suffix. A NotImplementedError with a sentence
is a warning. The exit status is 1 where something fails.

examples: nnunet-ext check nnUNetTrainerReversible
          nnunet-ext check nnUNetTrainerReversible_20epochs_NoMirroring --json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import traceback
from dataclasses import asdict

import _nnunet_ext_hook
from nnunet_ext.cli.terminal import counts, row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext check``."""
    parser.add_argument("name", metavar="NAME", help="a trainer, as after -tr")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--verbose", action="store_true", help="also show what is printed meanwhile, and every traceback"
    )


def run(args: argparse.Namespace) -> int:
    """Print a row for each check; return 1 where one fails."""
    from nnunet_ext.check.phantom import workspace

    output, found = sys.stdout, []
    said = sys.stderr if args.verbose else io.StringIO()
    with workspace(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        from nnunet_ext.check.trainer import SUBJECT_WIDTH, check

        _nnunet_ext_hook.install()  # the trainer is on trial, not the installation, which is the doctor's
        for finding in check(args.name, traceback.print_exception):
            found.append(finding)
            if not args.json:
                print(row(finding, SUBJECT_WIDTH), file=output, flush=True)
    print(json.dumps([asdict(finding) for finding in found], indent=2) if args.json else f"\n{counts(found)}")
    return int(any(finding.level == "failure" for finding in found))
