"""Memory that a training will need on a GPU, before it is started: for any plans and trainer, nnU-Net's own too.

One training step is counted on shapes, without a GPU.

examples: nnunet-ext estimate -d 4 -c 3d_fullres -p nnUNetReversiblePlans -tr nnUNetTrainerReversible
          nnunet-ext estimate -d 4 -c 2d
          nnunet-ext estimate --patch 128 128 128 --batch 4 -tr nnUNetTrainerMeUNet --json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from nnunet_ext.cli.terminal import wrapped
from nnunet_ext.nnunet.trust import OPTION


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext estimate``."""
    add = parser.add_argument
    add("-d", dest="dataset", metavar="D", help="data set that nnU-Net has planned: number or DatasetXXX_Name")
    add("-c", dest="configuration", metavar="C", help="configuration of the plans, e.g. 3d_fullres")
    add("-p", dest="plans_name", metavar="PLANS", help="name of the data set's plans (nnUNetPlans)")
    add("-tr", dest="trainer", metavar="NAME", default="nnUNetTrainer", help="trainer (%(default)s)")
    add("--plans", type=Path, metavar="FILE", help="a plans file, instead of -d")
    add("--patch", type=int, nargs="+", metavar="N", help="plan for 2 or 3 numbers of voxels, instead of -d")
    add("--channels", type=int, metavar="N", help="image channels, instead of those of dataset.json (else 1)")
    add("--classes", type=int, metavar="N", help="classes with background, instead of dataset.json's (else 3)")
    add("--batch", type=int, metavar="N", help="batch size, instead of that of the plans")
    add("--measure", action="store_true", help="run a real step on this machine's GPU too, and say the difference")
    add("--trust", **OPTION)
    add("--json", action="store_true", help="print the result as JSON, in bytes")


def run(args: argparse.Namespace) -> int:
    """Count and print; return the exit status."""
    with contextlib.redirect_stdout(sys.stderr):  # nnU-Net prints when it is imported
        from nnunet_ext.memory.estimate import estimate
        from nnunet_ext.nnunet.source import Source

        source = Source(
            dataset=args.dataset,
            plans=args.plans_name,
            plans_file=args.plans,
            patch=None if args.patch is None else tuple(args.patch),
            configuration=args.configuration,
            channels=args.channels,
            classes=args.classes,
            batch=args.batch,
            trusted=args.trust,
        )
        found = estimate(source.setting(), args.trainer, args.measure)
    if args.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        print("\n".join(line for text in found.lines() for line in wrapped(text)))
    return 0
