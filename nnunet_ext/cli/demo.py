"""Train, predict and compare on a small CT-like phantom, or on your data set, with nnU-Net's own commands.

Everything is written to one folder, which can be deleted afterwards; what your own nnUNet_raw,
nnUNet_preprocessed and nnUNet_results name is not touched. Call the same line again to finish an interrupted
demo.

examples: nnunet-ext demo
          nnunet-ext demo --raw Dataset004_Hippocampus --schedule 20epochs_50iters --output hippocampus-demo
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ext.errors import UsageError
from nnunet_ext.printable import printable_lines

if TYPE_CHECKING:
    from nnunet_ext.demo.settings import Demo
    from nnunet_ext.demo.workflow import Progress

TRAINERS = ("nnUNetTrainer", "nnUNetTrainerReversible")
SCHEDULE = "9epochs_20iters_NoMirroring"
_SECONDS_BETWEEN_LINES = 20.0  # where the output is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext demo``."""
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder of the demo (%(default)s)"
    )
    parser.add_argument(
        "--raw",
        type=Path,
        metavar="DatasetXXX_Name",
        help="folder of a data set in nnU-Net's raw format, instead of the phantom; it is only read",
    )
    parser.add_argument(
        "--trainers",
        nargs="+",
        default=list(TRAINERS),
        metavar="NAME",
        help="trainers to compare (%(default)s)",
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
        "--device",
        choices=("cpu", "cuda", "mps"),
        help="default: cuda where PyTorch finds an NVIDIA GPU, else cpu",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo and print where its report lies; return the exit status."""
    from nnunet_ext.comparison import tables
    from nnunet_ext.demo import settings, workflow
    from nnunet_ext.demo.errors import ChildError

    asked = settings.Settings(
        args.output, args.raw, tuple(args.trainers), args.schedule, args.configuration, args.device
    )
    printer = _Printer(sys.stdout.isatty())
    try:
        with _interrupted_by_signals():
            written = workflow.run(asked, _print_start, printer.show)
    except ChildError as error:
        printer.end_line()
        print(printable_lines(f"nnunet-ext demo: {error}"), file=sys.stderr)
        return 1
    except UsageError:
        printer.end_line()
        raise
    except KeyboardInterrupt:
        printer.end_line()
        print("The same call finishes this demo: what is done is kept.", file=sys.stderr)
        raise
    for model in written.models:
        seconds = tables.number(model.seconds_per_epoch, 1)
        print(f"{model.trainer}: Dice {tables.number(model.dice)}, {seconds} s per epoch")
    print(f"Report: {written.path}")
    return 0


def _print_start(demo: Demo) -> None:
    print(f"Demo in {demo.root}")
    print(f"{', '.join(demo.variables)} of the demo lie there; your own are left alone.")
    names = ", ".join(demo.trainers)
    print(f"{demo.dataset}, {demo.configuration}, {demo.schedule}, {demo.device}: {names}", flush=True)


class _Printer:
    """Prints the news of the steps: on a terminal in one line that changes, else line by line."""

    def __init__(self, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self._open = False
        self._last = 0.0

    def show(self, news: Progress) -> None:
        """Print one piece of news."""
        line = f"[{news.number}/{news.total}] {news.title}"
        running = f"{line}: {news.status + ', ' if news.status else ''}{news.seconds:.0f} s"
        if news.state == "reused":
            print(f"{line}: done by an earlier run", flush=True)
        elif news.state == "finished":
            self._clear()
            print(f"{line}: done in {news.seconds:.0f} s", flush=True)
        elif self._is_terminal:
            self._rewrite(running)
        elif news.state == "started" or news.seconds >= self._last + _SECONDS_BETWEEN_LINES:
            print(running if news.seconds else f"{line} ...", flush=True)
            self._last = news.seconds

    def end_line(self) -> None:
        """Leave a line that changes as it is."""
        if self._open:
            print(flush=True)
        self._open = False

    def _rewrite(self, line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line[:width]:<{width}}", end="", flush=True)
        self._open = True

    def _clear(self) -> None:
        if self._open:
            self._rewrite("")
            print("\r", end="")
        self._open = False


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
