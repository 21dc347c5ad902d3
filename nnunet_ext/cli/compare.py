"""Compare trained models with default nnU-Net: accuracy per structure with paired statistics, cost, learning curves.

Reads what standard nnU-Net runs left on disk, of this package or not, of this machine or another; nothing is trained
or changed. Writes report.html, report.md, report.json, cases.csv, figures, and tables for LaTeX.

examples: nnunet-ext compare -d 4 -c 3d_fullres -tr nnUNetTrainer nnUNetTrainerReversible -o comparison
          nnunet-ext compare -m runs/nnUNetTrainer__nnUNetPlans__3d_fullres copied/nnUNetTrainer__P2__3d_fullres
          nnunet-ext compare -pred predicted_by_A predicted_by_B -ref labelsTs --names A B --surface 2
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_ext import extras
from nnunet_ext.cli.terminal import print_table, status_line, wrapped
from nnunet_ext.files import check_folder
from nnunet_ext.nnunet.plans import DEFAULT_PLANS
from nnunet_ext.nnunet.trust import OPTION
from nnunet_ext.printable import printable

if TYPE_CHECKING:
    from nnunet_ext.comparison.compare import Comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext compare``."""
    runs = parser.add_argument_group("runs, by nnU-Net's names or by their folders")
    runs.add_argument("-d", metavar="DATASET", help="number or name of the data set")
    runs.add_argument("-c", nargs="+", default=["3d_fullres"], metavar="CONFIGURATION", help="default: 3d_fullres")
    runs.add_argument("-p", nargs="+", default=[DEFAULT_PLANS], metavar="PLANS", help=f"default: {DEFAULT_PLANS}")
    runs.add_argument(
        "-tr",
        nargs="+",
        default=["nnUNetTrainer"],
        metavar="TRAINER",
        help="default: nnUNetTrainer; each is taken with all of -p and -c that it was trained with",
    )
    runs.add_argument("-f", nargs="+", metavar="FOLD", help="folds; default: all that are validated")
    runs.add_argument(
        "-m", nargs="+", type=Path, default=[], metavar="FOLDER", help="folders TRAINER__PLANS__CONFIGURATION"
    )
    runs.add_argument("--results", type=Path, metavar="FOLDER", help="instead of nnUNet_results")
    cases = parser.add_argument_group("held-out cases (in addition to the runs, or instead of them)")
    cases.add_argument(
        "-pred", nargs="+", type=Path, default=[], metavar="FOLDER", help="predictions, in the order of the runs"
    )
    cases.add_argument("-ref", type=Path, metavar="FOLDER", help="their references")
    cases.add_argument(
        "-djfile", type=Path, metavar="FILE", help="dataset.json of the labels; default: beside predictions"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--baseline", metavar="NAME", help="label or trainer of the baseline; default: the first run")
    how.add_argument(
        "--margin", type=float, metavar="POINTS", help="loss of Dice that does not matter; without it no verdicts"
    )
    how.add_argument("--accept", nargs="+", default=[], metavar="CHECK", help="checks that may fail, as you mean it")
    how.add_argument(
        "--surface", nargs="?", type=float, const=1.0, metavar="MM", help="also NSD at this tolerance (1 mm) and HD95"
    )
    how.add_argument("--names", nargs="+", default=[], metavar="NAME", help="what tables call the runs")
    how.add_argument("--references", type=Path, metavar="FOLDER", help="references of validation cases of copied runs")
    how.add_argument("--images", type=Path, metavar="FOLDER", help="images of the cases, for the overlays")
    how.add_argument(
        "--benchmark", type=Path, metavar="FILE", help="benchmark.json; default: the one in the output folder"
    )
    how.add_argument("-np", type=int, metavar="N", help="processes that read segmentations; default: as nnU-Net")
    how.add_argument("--trust", **OPTION)
    parser.add_argument("-o", "--output", type=Path, default=Path("comparison"), help="folder (%(default)s)")
    less = parser.add_mutually_exclusive_group()
    less.add_argument("--json", action="store_true", help="print report.json instead of tables")
    less.add_argument("--figures", action="store_true", help="write the figures alone, straight into the folder")


def run(args: argparse.Namespace) -> int:
    """Compare, write the report and print its main tables; return the exit status."""
    extras.need("report", "compare")
    from nnunet_ext.comparison import compare, report, selection

    selected = selection.Selection(
        dataset=args.d,
        configurations=args.c,
        plans=args.p,
        trainers=args.tr,
        results=args.results,
        folds=args.f,
        folders=args.m,
        predictions=args.pred,
        references=args.ref,
        description=args.djfile,
        names=args.names,
        baseline=args.baseline,
        margin=args.margin,
        accepted=args.accept,
        tolerance=args.surface,
        validation_references=args.references,
        images=args.images,
        benchmark=args.benchmark,
        output=args.output,
        processes=args.np,
        trusted=args.trust,
    )
    check_folder(args.output)
    with status_line(sys.stderr) as show:
        comparison = compare.compare(selection.request(selected), show)
    if not args.json:
        _print(comparison)
    with status_line(sys.stderr) as show:
        written = report.write(comparison, args.output, _command(args), show, args.figures)
    if args.json:
        print((args.output / "report.json").read_text(encoding="utf-8"), end="")
        return 0
    print(f"{'Figures' if args.figures else 'Report'}: {written}")
    return 0


def _command(args: argparse.Namespace) -> str:
    """The call without what does not change the result: where it is written."""
    words, skip = ["nnunet-ext"], False
    for word in args.argv:
        if skip or word == "--json":
            skip = False
        elif word in ("-o", "--output"):
            skip = True
        elif not word.startswith("--output="):
            words.append(word)
    return shlex.join(words)


def _print(comparison: Comparison) -> None:
    from nnunet_ext.comparison import report, tables

    print("\n".join(wrapped(comparison.gate.first_line(comparison.evaluations))))
    for evaluation in comparison.evaluations:
        content = tables.means(evaluation, "Dice")
        header, *rows = ([*map(printable, row)] for row in (content.header, *content.rows))
        print_table(printable(f"Dice, {evaluation.name}"), header, rows)
        for line in report.conclusions(comparison, evaluation):
            print("\n".join(wrapped(line)))
    for line in comparison.warnings:
        print(printable(f"warning: {line}"), file=sys.stderr)
