"""Cross-validate trainers and data sets: plan, train all folds, validate, find the best configuration, compare.

Each training is a job, on Slurm or on the GPUs of this machine, that runs nnU-Net's own command. The same call again
starts what is missing. `status` shows how far it is, `stop` ends what runs; both need -o alone.

examples: nnunet-ext cv -d 4 -c 3d_fullres -tr nnUNetTrainer nnUNetTrainerReversible
          nnunet-ext cv -d 4 -c 3d_fullres -tr nnUNetTrainer --executor slurm --partition gpu --time 24:00:00
          nnunet-ext cv status
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ext import extras
from nnunet_ext.cli.terminal import print_table, status_line, wrapped
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.plans import DEFAULT_PLANS
from nnunet_ext.printable import counted, printable
from nnunet_ext.registry import CORE_TRAINER

if TYPE_CHECKING:
    from nnunet_ext.cluster.request import CrossValidation
    from nnunet_ext.cluster.status import Row

_SLURM_ONLY = ("partition", "cpu_partition", "time", "mem", "cpus", "setup", "slurm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext cv``."""
    parser.add_argument(
        "action", nargs="?", choices=("start", "status", "stop"), default="start", help="default: start what is missing"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("cross_validation"), help="folder of states and reports (%(default)s)"
    )
    what = parser.add_argument_group("what")
    many: dict[str, Any] = {"nargs": "+", "action": "extend"}
    what.add_argument("-d", **many, metavar="DATASET", help="numbers or names of data sets")
    what.add_argument("-c", **many, metavar="CONFIGURATION", help="default: 3d_fullres")
    what.add_argument(
        "-tr",
        **many,
        metavar="TRAINER[:PLANS]",
        help="default: nnUNetTrainer; the first is the baseline; with plans of its own, or with all of -p",
    )
    what.add_argument("-p", **many, metavar="PLANS", help=f"default: {DEFAULT_PLANS}")
    what.add_argument("-f", **many, type=int, metavar="FOLD", help="default: all folds of the split")
    what.add_argument("--npz", action="store_true", help="keep probabilities, so that ensembles are found")
    how = parser.add_argument_group("how")
    how.add_argument("--executor", choices=("local", "slurm"), default="local", help="default: local")
    how.add_argument("--gpus", type=int, metavar="N", help="GPUs of each training; 0: on the CPU; default: 1, if any")
    how.add_argument("-device", choices=("cuda", "cpu", "mps"), help="default: cuda, with --gpus 0 cpu")
    how.add_argument("--jobs", type=int, metavar="N", help="local: trainings at once; default: one on each GPU")
    how.add_argument("--wait", action="store_true", help="stay until all has ended")
    slurm = parser.add_argument_group("Slurm")
    slurm.add_argument("--partition", metavar="NAME", help="default: the cluster's")
    slurm.add_argument("--cpu-partition", metavar="NAME", help="of steps without GPUs; default: the same")
    slurm.add_argument("--time", help="limit of a job, as Slurm writes it (24:00:00); may be less than a training")
    slurm.add_argument("--mem", metavar="GIB", help="memory of a job (32)")
    slurm.add_argument("--cpus", type=int, metavar="N", help="cores of a job (12)")
    slurm.add_argument("--setup", **many, metavar="COMMAND", help='before a job, such as "module load cuda"')
    slurm.add_argument("--slurm", **many, metavar="OPTION=VALUE", help="further options of sbatch (account=lab)")
    parser.add_argument("--json", action="store_true", help="status: print the rows as JSON")


def run(args: argparse.Namespace) -> int:
    """Start, show or stop a cross-validation; return the exit status: 1 where a step has failed."""
    if sys.platform == "win32":
        raise UsageError("cv needs Linux or macOS, this is Windows: train with nnU-Net's own commands.")
    from nnunet_ext.cluster import start, status

    args.output = Path(os.path.abspath(args.output))
    if args.action == "stop":
        print(start.stop(args.output))
        return 0
    if args.action == "start":
        _start(args)
    waits = args.action == "start" and args.wait
    if waits:
        with status_line(sys.stdout) as show:
            found = status.wait(args.output, lambda rows: show(_summary(rows)))
    else:
        found = status.rows(args.output)
    if args.json:
        print(json.dumps([_record(row) for row in found], indent=2))
    else:
        _print(found, args.output)
    return int(any(row.what != "done" if waits else row.what == "failed" for row in found))


def _start(args: argparse.Namespace) -> None:
    extras.need("cluster", "cv")
    extras.need("report", "cv")
    if not args.d:
        raise UsageError("cv needs data sets, -d was not given: name them, or call `nnunet-ext cv status`.")
    is_slurm = args.executor == "slurm"
    given = [name for name in _SLURM_ONLY if getattr(args, name) is not None]
    if given and not is_slurm:
        raise UsageError(
            f"--{given[0].replace('_', '-')} is for Slurm, --executor is local: add --executor slurm, or leave it out."
        )
    if is_slurm and args.jobs is not None:
        raise UsageError("--jobs is for this machine, Slurm decides itself: leave it out, or take --executor local.")
    for name in ("jobs", "cpus"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}: correct it.")
    if args.gpus is not None and args.gpus < 0:
        raise UsageError(f"--gpus must be 0 or more, got {args.gpus}: correct it.")
    (_on_slurm if is_slurm else _here)(args)


def _on_slurm(args: argparse.Namespace) -> None:
    from nnunet_ext.cluster import slurm, start

    gpus = 1 if args.gpus is None else args.gpus
    minutes = slurm.minutes_of(args.time or "24:00:00")
    asked = _asked(args, gpus)
    job = slurm.Slurm(
        partition=args.partition,
        cpu_partition=args.cpu_partition,
        minutes=minutes,
        notice=slurm.notice_of(minutes),
        memory=slurm.gibibytes_of(args.mem or "32"),
        cpus=args.cpus or 12,
        setup=tuple(args.setup or ()),
        more=_options(args.slurm or ()),
    )
    tell = _tell(args)
    tell(f"Jobs in the queue: {start.start_on_slurm(asked, job, tell)}. They go on without this terminal.")


def _here(args: argparse.Namespace) -> None:
    from nnunet_ext.cluster import local, start

    wants = args.gpus is None and args.device in (None, "cuda")
    there = local.visible_gpus() if wants or args.gpus else []
    gpus = args.gpus if args.gpus is not None else int(bool(there))
    if args.device == "cuda" and not gpus:
        raise UsageError("-device cuda needs a GPU, --gpus is 0 or this machine shows none: leave -device out.")
    groups = local.shared_out(there, gpus, args.jobs)
    started = start.start_here(_asked(args, gpus), groups)
    _tell(args)(f"Workers started: {len(started)}. They go on without this terminal.")


def _tell(args: argparse.Namespace) -> Callable[[str], None]:
    """Print a line, where JSON follows not among it."""
    return lambda line: print(printable(line), file=sys.stderr if args.json else sys.stdout, flush=True)


def _asked(args: argparse.Namespace, gpus: int) -> CrossValidation:
    from nnunet_ext.cluster import request
    from nnunet_ext.nnunet.trainers import trainer_class

    device = args.device or ("cuda" if gpus else "cpu")
    if (device == "cuda") != bool(gpus):
        raise UsageError(f"-device {device} does not go with --gpus {gpus}: leave one of them out.")
    raw, preprocessed, results = request.folders_of_environment()
    methods = request.methods_of(args.tr or [CORE_TRAINER], args.p or [DEFAULT_PLANS])
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # what nnU-Net and PyTorch say when imported
        warnings.simplefilter("ignore")
        for method in methods:
            trainer_class(method.trainer)
    return request.CrossValidation(
        datasets=request.find_datasets(args.d, raw, preprocessed),
        methods=methods,
        configurations=tuple(dict.fromkeys(args.c or ["3d_fullres"])),
        folds=None if args.f is None else tuple(sorted(set(args.f))),
        device=device,
        gpus=gpus,
        npz=args.npz,
        raw=raw,
        preprocessed=preprocessed,
        results=results,
        output=args.output,
    )


def _options(words: Sequence[str]) -> dict[str, str]:
    pairs = [word.lstrip("-").partition("=") for word in words]
    for word, (name, equals, value) in zip(words, pairs, strict=True):
        if not name or (equals and not value):
            raise UsageError(
                f"--slurm must be options of sbatch as NAME=VALUE, or NAME, got {word}: write account=lab."
            )
    return {name: value for name, _, value in pairs}


def _summary(found: Sequence[Row]) -> str:
    whats = [row.what for row in found]
    return ", ".join(f"{what}: {whats.count(what)}" for what in dict.fromkeys(whats))


def _print(found: Sequence[Row], output: Path) -> None:
    for dataset in dict.fromkeys(row.step.dataset for row in found):
        _print_dataset(dataset, [row for row in found if row.step.dataset == dataset])
    print()
    for row in found:
        if row.what == "failed":
            print("\n".join(wrapped(f"failed: {row.step.dataset}, {row.step.title}: {row.text}")))
    for (dataset, text), number in Counter((r.step.dataset, r.text) for r in found if r.what == "blocked").items():
        print("\n".join(wrapped(f"blocked: {dataset}, {counted(number, 'step')}: {text}")))
    for text, number in Counter(row.text for row in found if row.what == "queued" and row.text).items():
        print("\n".join(wrapped(f"queued by Slurm, {text}: {number}")))
    print("\n".join(wrapped(f"{_summary(found)}. Folder: {output}")))


def _print_dataset(dataset: str, found: Sequence[Row]) -> None:
    """A line for each training with its folds side by side, then one for each step of the whole data set."""
    from nnunet_ext.cluster.training import Training

    folds: dict[str, dict[int, Row]] = {}
    for row in found:
        if isinstance(row.step, Training):
            name = f"{row.step.method.trainer} {row.step.method.plans} {row.step.configuration}"
            folds.setdefault(name, {})[row.step.fold] = row
    numbers = sorted({number for own in folds.values() for number in own})
    table = [[name, *(_cell(own.get(number)) for number in numbers)] for name, own in folds.items()]
    print_table(f"{dataset}, folds", ("training", *map(str, numbers)), table)
    others = [(row.step.title, row.what) for row in found if not isinstance(row.step, Training)]
    print_table(f"{dataset}, all folds", ("step", "state"), others)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    lines: list[str] = [row.what]
    lines += [] if row.epoch is None else [f"{row.epoch}/{row.epochs or '?'}"]
    lines += [] if row.seconds_left is None else [_duration(row.seconds_left)]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _record(row: Row) -> dict[str, Any]:
    return {
        "dataset": row.step.dataset,
        "step": row.step.name,
        "title": row.step.title,
        "state": row.what,
        "text": row.text,
        "epoch": row.epoch,
        "epochs": row.epochs,
        "seconds_left": row.seconds_left,
    }
