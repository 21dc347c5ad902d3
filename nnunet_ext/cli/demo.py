"""Train, predict and compare on a small CT-like phantom, or on your data set, with nnU-Net's own commands.

Everything is written to one folder, which can be deleted afterwards; what your own nnUNet_raw,
nnUNet_preprocessed and nnUNet_results name is not touched. Call the same line again to finish an interrupted
demo.

examples: nnunet-ext demo
          nnunet-ext demo --raw Dataset004_Hippocampus --schedule 20epochs_50iters --output hippocampus-demo
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunet_ext import extras
from nnunet_ext.cli.terminal import status_line
from nnunet_ext.printable import printable, printable_lines

TRAINERS = ("nnUNetTrainer", "nnUNetTrainerReversible")
SCHEDULE = "9epochs_20iters_NoMirroring"
_SECONDS_BETWEEN_LINES = 20.0  # where the output is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext demo``."""
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of the demo (%(default)s)")
    parser.add_argument(
        "--raw",
        type=Path,
        metavar="DatasetXXX_Name",
        help="folder of a data set in nnU-Net's raw format, instead of the phantom; it is only read",
    )
    parser.add_argument(
        "--trainers", nargs="+", default=list(TRAINERS), metavar="NAME", help="trainers to compare (%(default)s)"
    )
    parser.add_argument(
        "--schedule",
        default=SCHEDULE,
        help="[<N>epochs][_<M>iters][_NoMirroring] for every trainer, or 'full' for their own (%(default)s)",
    )
    parser.add_argument(
        "-c",
        "--configuration",
        default="3d_fullres",
        choices=("2d", "3d_fullres", "3d_lowres"),
        help="configuration of nnU-Net's plans (%(default)s)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "mps"), help="default: cuda where PyTorch finds an NVIDIA GPU, else cpu"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; return the exit status."""
    extras.need("report", "demo")
    from nnunet_ext.demo import workflow
    from nnunet_ext.demo.commands import CommandError
    from nnunet_ext.demo.settings import Demo

    root, raw = (path and Path(os.path.abspath(path)) for path in (args.output, args.raw))
    demo = Demo(
        root=root,
        raw=raw,
        trainers=tuple(args.trainers),
        schedule=args.schedule,
        configuration=args.configuration,
        device=args.device,
    )
    try:
        with _interrupted_by_signals(), _printer() as say:
            workflow.run(demo, say)
    except CommandError as error:
        print(printable_lines(f"nnunet-ext demo: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("The same call finishes this demo: what is done is kept.", file=sys.stderr)
        raise
    return 0


@contextmanager
def _printer() -> Iterator[Callable[[str, bool], None]]:
    """Give a function that prints a line: one that stays, or one that on a terminal the next replaces.

    Elsewhere one of these is printed now and then, and the first after each that stays.
    """
    last = -math.inf
    with status_line(sys.stdout) as show:

        def say(line: str, stays: bool) -> None:
            nonlocal last
            now = time.monotonic()
            show("" if stays else line)
            if stays or (not sys.stdout.isatty() and now >= last + _SECONDS_BETWEEN_LINES):
                print(printable(line), flush=True)
                last = -math.inf if stays else now

        yield say


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Treat a polite kill and, unless under `nohup`, the end of the terminal as Ctrl-C."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
