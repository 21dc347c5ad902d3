"""Make a trained model small and fast to ship: fused, batch norms folded, only weights, in a precision of your choice.

Writes a folder that nnUNetv2_predict_from_modelfolder runs wherever this package is installed. The fused network is
compared with the trained one before anything is written.

examples: nnunet-ext deploy -m RESULTS/nnUNetTrainerHalfWidthBN__nnUNetPlans__3d_fullres -o shipped
          nnunet-ext deploy -m MODEL -o shipped --folds 0 --onnx -i SCANS
          nnUNetv2_predict_from_modelfolder -m shipped -i SCANS -o PREDICTED -f 0
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT
from nnunet_ext.nnunet.trust import OPTION
from nnunet_ext.printable import printable

if TYPE_CHECKING:
    from nnunet_ext.deploy.check import Difference
    from nnunet_ext.deploy.ship import Shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext deploy``."""
    add = parser.add_argument
    add("-m", dest="model", type=Path, required=True, metavar="MODEL", help="folder TRAINER__PLANS__CONFIGURATION")
    add("-o", dest="output", type=Path, required=True, metavar="OUT", help="folder to make; must not exist")
    add("--folds", nargs="+", metavar="F", help="folds to ship (all that are trained)")
    add("-chk", dest="checkpoint", default=FINAL_CHECKPOINT, metavar="NAME", help="default: %(default)s")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: %(default)s")
    add(
        "--form",
        choices=("hybrid", "t", "dense"),
        default="hybrid",
        help="of FasterFusion blocks: hybrid is smallest and fastest, t the paper's, dense plain convolutions",
    )
    add("--onnx", action="store_true", help="also write ONNX files for one patch, in float32")
    add("-i", dest="images", type=Path, metavar="SCANS", help="check with the first of these images as well")
    add("--trust", **OPTION)


def run(args: argparse.Namespace) -> int:
    """Deploy and print; return the exit status."""
    with contextlib.redirect_stdout(sys.stderr):  # nnU-Net prints when it is imported
        from nnunet_ext.deploy.model import TrainedModel
        from nnunet_ext.deploy.ship import DeployOptions, precision_note, predict_command, ship

        model = TrainedModel.read(args.model, args.folds, args.checkpoint, args.trust)
        options = DeployOptions(args.dtype, args.form, args.onnx, args.images)
        shipped = ship(model, args.output, options, lambda what: print(printable(what), file=sys.stderr))
    for fold, result in shipped.items():
        print("\n".join(map(printable, _lines(fold, result))))
    if args.dtype != "float32":
        print(precision_note(args.dtype))
    print(printable(f"Predict: {shlex.join(predict_command(args.output, shipped))}"))
    return 0


def _lines(fold: str, result: Shipped) -> Iterable[str]:
    yield f"fold {fold}"
    yield f"  parameters  {result.parameters_before:,} -> {result.parameters:,}"
    yield f"  file        {result.bytes_before:,} -> {result.bytes:,} bytes"
    for found in result.differences:
        yield f"  {_difference(found)}"
    for found in result.onnx_differences:
        yield f"  ONNX Runtime, {_difference(found)}"


def _difference(found: Difference) -> str:
    return (
        f"image {found.image}: logits differ by up to {found.absolute:.1e} ({found.relative:.1e} of the largest), "
        f"the label changes in {found.voxels:,} of {found.total:,} voxels"
    )
