"""Predict new scans with both stages of a trained cascade, and keep the predictions of the first.

The same as nnUNetv2_predict with the first stage, then with the second and -prev_stage_predictions. The result is in
OUT; the predictions of stage 1 are kept beside it, in OUT_<configuration of stage 1>.

examples: nnunet-ext cascade-predict -i SCANS -o predicted -d 4
          nnunet-ext cascade-predict -i SCANS -o predicted -d 4 -f 0 1 --keep context -device cpu --continue_prediction
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT
from nnunet_ext.nnunet.trust import OPTION
from nnunet_ext.printable import printable

FOLDS = ("0", "1", "2", "3", "4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext cascade-predict``."""
    add = parser.add_argument
    add("-i", dest="images", type=Path, required=True, metavar="IN", help="folder of scans, named as in imagesTs")
    add("-o", dest="output", type=Path, required=True, metavar="OUT", help="folder of the result")
    add("-d", dest="dataset", required=True, metavar="D", help="number or name of the data set")
    add("-p", dest="plans", default="nnUNetMeCascadePlans", metavar="PLANS", help="default: %(default)s")
    add("-tr", dest="trainer", default="nnUNetTrainerMeCascade", metavar="X", help="default: %(default)s")
    add(
        "-c", dest="configuration", default="3d_post_concat", metavar="C", help="the second stage; default: %(default)s"
    )
    add("-f", dest="folds", nargs="+", default=FOLDS, metavar="F", help="folds of both stages; default: 0 1 2 3 4")
    add("-f1", dest="first_folds", nargs="+", metavar="F", help="folds of stage 1, where they are others")
    add("-chk", dest="checkpoint", default=FINAL_CHECKPOINT, metavar="NAME", help="default: %(default)s")
    add("--keep", type=Path, metavar="DIR", help="folder of stage 1's predictions")
    add("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="default: %(default)s")
    add("-step_size", type=float, default=0.5, metavar="S", help="of the sliding window; default: %(default)s")
    add("--disable_tta", action="store_true", help="without mirroring: faster, less accurate")
    add("--save_probabilities", action="store_true", help="of stage 2, as .npz")
    add("-npp", type=int, default=3, metavar="N", help="processes of preprocessing; default: %(default)s")
    add("-nps", type=int, default=3, metavar="N", help="processes of export; default: %(default)s")
    add(
        "--continue_prediction",
        action="store_true",
        help="keep what an interrupted call with the same settings has finished",
    )
    add("--trust", **OPTION)


def run(args: argparse.Namespace) -> int:
    """Predict and print; return the exit status."""
    with contextlib.redirect_stdout(sys.stderr):  # nnU-Net prints while it predicts
        from nnunet_ext.cascade.predict import Options, predict
        from nnunet_ext.cascade.stage import find_stages

        folds = (args.first_folds or args.folds, args.folds)
        stages = find_stages(
            args.dataset, args.plans, args.trainer, args.configuration, folds, args.checkpoint, args.trust
        )
        options = Options(
            device=args.device,
            step_size=args.step_size,
            mirroring=not args.disable_tta,
            save_probabilities=args.save_probabilities,
            preprocessing=args.npp,
            export=args.nps,
            keep_going=args.continue_prediction,
        )
        kept = predict(
            stages, args.images, args.output, args.keep, options, lambda line: print(printable(line), file=sys.stderr)
        )
    print(printable(f"Stage 1: {kept}"))
    print(printable(f"Result: {args.output}"))
    return 0
