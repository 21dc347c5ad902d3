"""Checkpoints of nnU-Net, read without running code that the file may hold."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnunet_ext.errors import UsageError

# What NumPy 1 and NumPy 2 call the module whose `scalar` a pickled number asks for.
_MODULES_OF_SCALAR = ("numpy.core.multiarray", "numpy._core.multiarray")


def read_checkpoint(path: Path, cure: str) -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`; beside tensors nnU-Net stores numbers of NumPy, and nothing else.

    Args:
        path: of the file.
        cure: what to do when it can't be read, as the end of a sentence.

    Raises:
        UsageError: it is cut off, holds anything else, or is no checkpoint.
    """
    import torch

    try:
        with torch.serialization.safe_globals(_numbers_of_numpy()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"{path} is no whole checkpoint of nnU-Net ({reason}): {cure}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a dictionary, got a {type(content).__name__}: {cure}.")
    return content


def _numbers_of_numpy() -> list[Any]:
    """What a pickled number of NumPy needs, written by NumPy 1 or 2 and read by either."""
    import numpy as np

    # NumPy moved the module of this function, and 1.26 has a stub of the new one: ask a number for it.
    scalar = np.float64(0).__reduce__()[0]
    codes = ("?", *np.typecodes["AllInteger"], *np.typecodes["Float"])
    types = {type(np.dtype(code)) for code in codes}
    return [*(_under_name_of(module, scalar) for module in _MODULES_OF_SCALAR), np.dtype, *types]


def _under_name_of(module: str, scalar: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as one of `module`: PyTorch takes pairs of function and name from 2.6 on only."""

    def alias(*arguments: Any) -> Any:
        return scalar(*arguments)

    alias.__module__, alias.__name__, alias.__qualname__ = module, "scalar", "scalar"
    return alias
