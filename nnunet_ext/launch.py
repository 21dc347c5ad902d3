"""Runs a command of nnU-Net with the hook installed explicitly, for ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.

PyTorch then doesn't call the hook. In this process `run` does; processes that nnU-Net starts (distributed
training) import nnU-Net afresh and find our trainers through its own variable ``nnUNet_extTrainer``, which
needs nnU-Net 2.8.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import _nnunet_ext_hook
from nnunet_ext.errors import UsageError
from nnunet_ext.registry import EXTERNAL_TRAINERS

SHIM = Path(__file__).with_name("ext_trainer_shim")


def run(command: str, arguments: Sequence[str]) -> Any:
    """Run nnU-Net's console command in this process and return what it returns, for `sys.exit`.

    Args:
        command: Name of one of nnU-Net's commands, e.g. "nnUNetv2_train".
        arguments: What follows it, passed unchanged.

    Raises:
        UsageError: nnU-Net isn't installed, or has no such command.
    """
    entry = find(command)
    _nnunet_ext_hook.install()
    os.environ[EXTERNAL_TRAINERS] = with_shim(os.environ.get(EXTERNAL_TRAINERS, ""))
    sys.argv = [command, *arguments]
    return entry.load()()


def find(command: str) -> EntryPoint:
    """Return the entry point of nnU-Net's `command`.

    Raises:
        UsageError: nnU-Net isn't installed, or has no such command; the message holds the near names.
    """
    try:
        host = distribution("nnunetv2")
    except PackageNotFoundError:
        raise UsageError(f"nnunetv2 isn't installed for {sys.executable}: pip install nnunetv2") from None
    commands = {entry.name: entry for entry in host.entry_points.select(group="console_scripts")}
    if command in commands:
        return commands[command]
    near = difflib.get_close_matches(command, commands, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"It has {', '.join(sorted(commands))}."
    raise UsageError(f"nnunetv2 {host.version} has no command {command!r}. {hint}")


def with_shim(folders: str) -> str:
    """Append the folder of the shim to a list of folders separated by `os.pathsep`, unless it is there."""
    known = [folder for folder in folders.split(os.pathsep) if folder]
    return os.pathsep.join(known if str(SHIM) in known else [*known, str(SHIM)])
