"""Console commands of nnU-Net and of this package, as a process that starts them finds them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence

from nnunet_ext.errors import UsageError


def arguments(command: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """What to start for a command; where the hook that finds our names is off, `nnunet-ext run` does without.

    Args:
        command: Name of a console command and its arguments.
        variables: Environment that it will have.

    Raises:
        UsageError: it is not installed.
    """
    is_off = variables.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0" and command[0].startswith("nnUNetv2_")
    name, *rest = ["nnunet-ext", "run", *command] if is_off else command
    return [_find(name), *rest]


def _find(name: str) -> str:
    """Path of a console command beside the running Python, else on PATH."""
    beside = os.path.dirname(sys.executable)
    found = shutil.which(name, path=beside) or shutil.which(name)
    if found is None:
        raise UsageError(f"{name} is neither in {beside} nor on PATH: install nnunetv2 and nnunet-ext there.")
    return found
