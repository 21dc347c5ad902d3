"""The command ``nnunet-ext``: parsing and printing; each command's module is imported when it is called."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from nnunet_ext import __version__
from nnunet_ext.cli.help import Formatter
from nnunet_ext.errors import UsageError
from nnunet_ext.printable import printable

# command -> one line of help; nnunet_ext.cli.<command> (- is _) has add_arguments(parser) and run(args) -> exit status
COMMANDS = {
    "list": "which trainer is for what, with its planners and plans",
    "doctor": "prove that nnU-Net's commands find them, and say what to repair",
    "check": "train and predict a moment with a trainer, and say what of nnU-Net it breaks",
    "run": "run a command of nnU-Net with the hook installed explicitly",
    "demo": "train, predict and compare on a small phantom or on your data",
    "compare": "accuracy and cost of trained models next to default nnU-Net, as a report",
    "cv": "cross-validate trainers and data sets, on a cluster or this machine's GPUs",
    "deploy": "a trained model fused, small and fast, for prediction elsewhere",
    "cascade-predict": "both predictions of a trained cascade, the first one kept",
    "advise": "which trainer and planner to take for a data set and a GPU, with the commands",
    "estimate": "memory that a training will need, before it is started",
    "benchmark": "parameters, operations, memory and time of networks next to default nnU-Net",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``nnunet-ext <command> ...``; return the exit status."""
    # Once imported, the command's module `list` stands for the builtin in this namespace.
    arguments = [*(sys.argv[1:] if argv is None else argv)]
    parser = argparse.ArgumentParser(
        prog="nnunet-ext",
        description="Memory-saving and fast networks for nnU-Net v2.",
        epilog="example: nnunet-ext list",
        formatter_class=Formatter,
    )
    parser.add_argument("--version", action="version", version=f"nnunet-ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        # Only the command that was asked for is imported.
        asked = bool(arguments) and arguments[0] == name
        module = importlib.import_module(f"nnunet_ext.cli.{name.replace('-', '_')}") if asked else None
        command = commands.add_parser(
            name, help=text, description=(module.__doc__ if module else None), formatter_class=Formatter
        )
        if module is not None:
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    parsed.argv = arguments
    try:
        status = int(parsed.run(parsed))
        sys.stdout.flush()  # here a full disk, or a reader that has gone, shows at the latest
        return status
    except UsageError as error:
        print(printable(f"nnunet-ext {parsed.command}: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        if parsed.command == "run" or not _is_of_disk(error):
            raise
        _close_output()
        if error.errno != errno.EPIPE:  # `nnunet-ext list | head` is no error of the user
            reason = f"can't write {error.filename or 'its output'}: {error.strerror or error}"
            print(printable(f"nnunet-ext {parsed.command}: {reason}. Free space, then call again."), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"nnunet-ext {parsed.command}: interrupted", file=sys.stderr)
        return 130


def _is_of_disk(error: OSError) -> bool:
    """Whether a disk, a quota or a pipe takes no more: nothing that the code could do about."""
    names = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EPIPE")
    return error.errno in {getattr(errno, name, -1) for name in names} or "usable temporary" in str(error)


def _close_output() -> None:
    """Let Python's own flush at the end write to nowhere, if it can't write to the standard output."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # tests replace the stream by one without a descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
