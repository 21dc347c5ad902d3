"""Run a command of nnU-Net with the hook installed explicitly.

Needed only where TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps PyTorch from installing it; `nnunet-ext doctor` tells.
Everything after the command's name is passed to it unchanged.

example: nnunet-ext run nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainer_20epochs_50iters
"""

from __future__ import annotations

import argparse
import sys

from nnunet_ext import launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext run``."""
    parser.usage = "%(prog)s [-h] nnUNetv2_command ..."
    parser.add_argument("nnunet_command", metavar="nnUNetv2_command", help="name of nnU-Net's command")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of nnU-Net's command")


def run(args: argparse.Namespace) -> int:
    """Run the command and leave with its exit status."""
    sys.exit(launch.run(args.nnunet_command, args.arguments))
