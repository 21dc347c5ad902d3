"""Make a trained model ready to ship: fused, batch norms folded, only weights, compared with what was trained.

Writes a folder that nnUNetv2_predict_from_modelfolder runs wherever this package is installed; with --stock wherever
nnU-Net is; with --standalone its own predict.py runs it, without nnU-Net and PyTorch.

examples: nnunet-ext deploy -m RESULTS/nnUNetTrainerHalfWidthBN__nnUNetPlans__3d_fullres -o shipped --dtype float16
          nnunet-ext deploy -m MODEL -o shipped --standalone -i SCANS
          python shipped/predict.py -i SCANS -o PREDICTED
          nnunet-ext deploy -m MODEL -o shipped --stock
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

from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT
from nnunet_ext.nnunet.trust import OPTION
from nnunet_ext.printable import printable

if TYPE_CHECKING:
    from nnunet_ext.deploy.check import Difference
    from nnunet_ext.deploy.model import TrainedModel
    from nnunet_ext.deploy.ship import Shipped
    from nnunet_ext.deploy.standalone.export import Exported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext deploy``."""
    add = parser.add_argument
    add("-m", dest="model", type=Path, required=True, metavar="MODEL", help="folder TRAINER__PLANS__CONFIGURATION")
    add(
        "-o",
        dest="output",
        type=Path,
        required=True,
        metavar="OUT",
        help="folder to make; must not exist (--report goes on in it)",
    )
    add("--folds", nargs="+", metavar="F", help="folds to ship (those trained; fold_all if alone)")
    add("-chk", dest="checkpoint", default=FINAL_CHECKPOINT, metavar="NAME", help="default: %(default)s")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--stock", action="store_true", help="a model of nnU-Net's own: predicts without this package")
    kind.add_argument(
        "--standalone", action="store_true", help="ONNX files and predict.py: predicts without nnU-Net and PyTorch"
    )
    kind.add_argument(
        "--report", action="store_true", help="ship nothing: time each step from nnU-Net to the fastest, on -i"
    )
    add("--student", type=Path, metavar="MODEL2", help="of --report: a smaller model that ends the chain")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: %(default)s")
    add(
        "--form",
        choices=("hybrid", "t", "dense"),
        help="of FasterFusion blocks: hybrid (default) is smallest and fastest, t the paper's, dense plain",
    )
    add("--onnx", action="store_true", help="also write ONNX files for one patch, in float32")
    add(
        "-i",
        dest="images",
        type=Path,
        metavar="SCANS",
        help="check with these images: with the first, --standalone with all",
    )
    add(
        "--engines",
        nargs="+",
        metavar="E",
        choices=("onnxruntime", "openvino", "openvino-bfloat16", "openvino-int8"),
        help="onnxruntime, openvino, openvino-bfloat16, openvino-int8: of --standalone, the first is its default "
        "(onnxruntime), and of --report (all); int8 is calibrated on -i",
    )
    add("--calibrate", dest="calibration", type=Path, metavar="SCANS", help="of openvino-int8 (those of -i)")
    add(
        "-ref", dest="references", type=Path, metavar="LABELS", help="of -i: --standalone reports Dice before and after"
    )
    add("--trust", **OPTION)


def run(args: argparse.Namespace) -> int:
    """Deploy and print; return the exit status."""
    refuse_options(args)
    with contextlib.redirect_stdout(sys.stderr):  # nnU-Net prints when it is imported
        from nnunet_ext.deploy.model import TrainedModel

        model = TrainedModel.read(args.model, args.folds, args.checkpoint, args.trust)
        make = _report if args.report else _standalone if args.standalone else _stock if args.stock else _fused
        lines = make(model, args)
    print("\n".join(map(printable, lines)))
    return 0


def refuse_options(args: argparse.Namespace) -> None:
    """See that no option is given that another one leaves without meaning.

    Raises:
        UsageError: names it.
    """
    kinds = {"--standalone": args.standalone, "--stock": args.stock, "--report": args.report}
    kind = next((name for name, is_it in kinds.items() if is_it), "")
    for given, option in ((args.engines, "--engines"), (args.references, "-ref"), (args.calibration, "--calibrate")):
        if given and kind not in ("--standalone", "--report"):
            raise UsageError(f"{option} is an option of --standalone and --report: add one of them, or omit it.")
    for given, option in ((args.dtype != "float32", "--dtype"), (args.onnx, "--onnx"), (args.form, "--form")):
        if given and kind and not (option == "--form" and args.standalone):
            raise UsageError(f"{kind} ships float32 in a form of its own, {option} has no meaning there: omit it.")
    if args.report and args.images is None:
        raise UsageError("--report needs scans to predict: give them by -i.")
    if args.student is not None and not args.report:
        raise UsageError("--student is an option of --report: add it, or omit --student.")


def _show(what: str) -> None:
    print(printable(what), file=sys.stderr)


def _fused(model: TrainedModel, args: argparse.Namespace) -> list[str]:
    from nnunet_ext.deploy.ship import DeployOptions, precision_note, predict_command, ship

    options = DeployOptions(args.dtype, args.form or "hybrid", args.onnx, args.images)
    shipped = ship(model, args.output, options, _show)
    lines = [line for fold, result in shipped.items() for line in _lines(fold, result)]
    if args.dtype != "float32":
        lines.append(precision_note(args.dtype))
    return [*lines, f"Predict: {shlex.join(predict_command(args.output, shipped))}"]


def _stock(model: TrainedModel, args: argparse.Namespace) -> list[str]:
    from nnunet_ext.deploy.ship import predict_command
    from nnunet_ext.deploy.stock import stock

    stocked = stock(model, args.output, args.images, _show)
    lines = []
    for fold, result in stocked.items():
        lines += [f"fold {fold}: {result.network} of nnU-Net{', batch norms folded' if result.is_folded else ''}"]
        lines += [f"  file        {result.bytes_before:,} -> {result.bytes:,} bytes"]
        lines += [f"  {_difference(found)}" for found in result.differences]
    return [*lines, f"Predict: {shlex.join(predict_command(args.output, stocked))}"]


def _standalone(model: TrainedModel, args: argparse.Namespace) -> list[str]:
    from nnunet_ext.deploy.standalone.export import ExportOptions, export

    engines = args.engines or ["onnxruntime"]
    options = ExportOptions(
        engines=engines,
        form=args.form or "hybrid",
        images=args.images,
        references=args.references,
        calibration=args.calibration,
    )
    exported = export(model, args.output, options, _show)
    lines = []
    for fold, differences in exported.differences.items():
        lines += [f"fold {fold}", *(f"  ONNX Runtime, {_difference(found)}" for found in differences)]
    for rule in exported.postprocessing:
        lines.append(f"Postprocessing: of the labels {rule['labels']} the largest component stays.")
    for engine in engines:
        lines += _parity(engine, exported)
    python = shlex.join(["python", str(args.output / "predict.py"), "-i", "IN", "-o", "OUT"])
    requirements = shlex.quote(str(args.output / "requirements.txt"))
    return [*lines, f"{exported.bytes:,} bytes", f"Predict: pip install -r {requirements}; {python}"]


def _report(model: TrainedModel, args: argparse.Namespace) -> list[str]:
    from nnunet_ext.deploy.model import TrainedModel
    from nnunet_ext.deploy.report import Chain, engines_here, report, table

    student = None if args.student is None else TrainedModel.read(args.student, None, args.checkpoint, args.trust)
    engines = list(dict.fromkeys(args.engines or engines_here()))
    chain = Chain(
        model=model,
        images=args.images,
        references=args.references,
        engines=engines,
        calibration=args.calibration,
        student=student,
    )
    rows = report(chain, args.output, _show)
    return [*table(rows).splitlines(), f"Written to {args.output}: speed.md, speed.json, speed.svg"]


def _parity(engine: str, exported: Exported) -> Iterable[str]:
    """What an engine predicts of the images, beside nnU-Net."""
    cases = [case for case in exported.cases if case.engine == engine]
    if not cases:
        yield f"{engine}: not compared with nnU-Net: give images by -i."
        return
    yield f"{engine}: {exported.equal(engine):.4%} of all voxels have nnU-Net's label"
    for case in cases:
        accuracy = "" if case.accuracy is None else f", Dice {case.accuracy:.4f}, nnU-Net {case.nnunet_accuracy:.4f}"
        yield (
            f"  {case.case}: {1 - case.different / case.voxels:.4%} of {case.voxels:,} voxels, lowest Dice between "
            f"both {case.dice:.4f}{accuracy}; {case.seconds:.1f} s, nnU-Net {case.nnunet_seconds:.1f} s"
        )


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
