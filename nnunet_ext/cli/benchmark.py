"""Parameters, operations, memory and time of networks next to default nnU-Net, on the same plan and in one run.

Without -tr, every registered trainer takes part. Memory is counted on shapes at full size, in float16 autocast as
nnU-Net trains on every GPU and in float32; with a GPU it is measured too.

examples: nnunet-ext benchmark -d 4 -c 3d_fullres
          nnunet-ext benchmark --patch 128 128 128 --repeats 0 --depth 1 2 4 8 16
          nnunet-ext benchmark --plans nnUNetPlans.json -tr nnUNetTrainerReversible -o result
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ext import extras
from nnunet_ext.cli.terminal import print_table, status_line, wrapped
from nnunet_ext.files import check_folder
from nnunet_ext.nnunet.trust import OPTION

if TYPE_CHECKING:
    from nnunet_ext.benchmark.records import Report
    from nnunet_ext.benchmark.table import BenchmarkTable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext benchmark``."""
    add = parser.add_argument
    add("-d", dest="dataset", metavar="D", help="data set that nnU-Net has planned: number or DatasetXXX_Name")
    add("-c", dest="configuration", metavar="C", help="configuration of the plans, e.g. 3d_fullres")
    add("-p", dest="plans_name", metavar="PLANS", help="name of the data set's plans (nnUNetPlans)")
    add("--plans", type=Path, metavar="FILE", help="a plans file, instead of -d; dataset.json beside it is read")
    add("--patch", type=int, nargs="+", metavar="N", help="plan for 2 or 3 numbers of voxels, instead of -d")
    add("-tr", dest="trainers", nargs="+", metavar="NAME", help="trainers to compare (all registered ones)")
    add("--channels", type=int, metavar="N", help="image channels, instead of those of dataset.json (else 1)")
    add("--classes", type=int, metavar="N", help="classes with background, instead of dataset.json's (else 3)")
    add("--batch", type=int, metavar="N", help="batch size, instead of that of the plans")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where PyTorch finds an NVIDIA GPU, else cpu")
    add(
        "--precision",
        choices=("float32", "mixed"),
        help="of times and of measured memory; default: mixed on cuda, float32 on cpu",
    )
    add("--repeats", type=int, default=5, metavar="N", help="timed rounds; 0: no times (%(default)s)")
    add("--time-patch", type=int, nargs="+", metavar="N", help="a smaller patch for the times")
    add(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="run training steps compiled too, as nnU-Net trains on CUDA; default: on cuda",
    )
    add(
        "--budget",
        type=float,
        nargs="*",
        metavar="SHARE",
        help="rows of default nnU-Net compiled with this activation_memory_budget; default: 0.5 without -tr, else none",
    )
    add("--depth", type=int, nargs="+", default=[], metavar="N", help="memory against blocks per stage")
    add("-o", dest="output", type=Path, metavar="OUT", help="folder for JSON, Markdown and figures")
    add("--trust", **OPTION)
    add("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, print and, with -o, write; return the exit status."""
    extras.need("report", "benchmark")
    command = shlex.join(["nnunet-ext", *args.argv])
    # Nothing but the result goes to the standard output; nnU-Net prints when it is imported.
    with contextlib.redirect_stdout(sys.stderr):
        if args.output is not None:
            check_folder(args.output)
        report = _measure(args)
        from nnunet_ext.benchmark.report import to_json, write
    if args.json:
        print(to_json(report, command))
    else:
        _print(report)
    if args.output is not None:  # after the print: measurements take long, and the disk may be full
        written = write(report, command, args.output)
        print("\n".join(f"Written: {path}" for path in written), file=sys.stderr if args.json else sys.stdout)
    return 0


def _measure(args: argparse.Namespace) -> Report:
    from nnunet_ext.benchmark.machine import Machine
    from nnunet_ext.benchmark.request import BenchmarkRequest
    from nnunet_ext.benchmark.run import run as run_benchmark
    from nnunet_ext.nnunet.source import Source

    machine = Machine.find(args.device, args.precision)
    source = Source(
        dataset=args.dataset,
        plans=args.plans_name,
        plans_file=args.plans,
        patch=_tuple(args.patch),
        configuration=args.configuration,
        channels=args.channels,
        classes=args.classes,
        batch=args.batch,
        trusted=args.trust,
    )
    request = BenchmarkRequest(
        source.setting(),
        machine,
        _tuple(args.trainers),
        args.repeats,
        time_patch=_tuple(args.time_patch),
        depths=tuple(args.depth),
        compiled=args.compiled,
        budgets=_tuple(args.budget),
    )
    with status_line(sys.stderr) as show:
        return run_benchmark(request, lambda done, total, what: show(f"{done}/{total} {what}"))


def _tuple(values: list[int] | list[float] | list[str] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def _print(report: Report) -> None:
    from nnunet_ext.benchmark import table

    print("\n".join(wrapped(table.headline(report))))
    for found in table.tables(report):
        print_table(found.title, *_lines_joined(found))
    print()
    for note in table.notes(report):
        print("\n".join(wrapped(note)))


def _lines_joined(found: BenchmarkTable) -> tuple[list[str], list[list[str]]]:
    header, *rows = ([*map("\n".join, row)] for row in (found.header, *found.rows))
    return header, rows
