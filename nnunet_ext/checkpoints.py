"""Checkpoints of nnU-Net, read without running code that the file may hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from nnunet_ext.errors import UsageError


def read_checkpoint(path: Path, cure: str) -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`; beside tensors nnU-Net stores numbers of NumPy, and nothing else.

    Args:
        path: of the file.
        cure: what to do when it can't be read, as the end of a sentence.

    Raises:
        UsageError: it is cut off, holds anything else, or is no checkpoint.
    """
    import numpy as np
    import torch

    multiarray = getattr(np, "_core", None) or np.core  # what NumPy 2 calls _core
    scalar = multiarray.multiarray.scalar
    types = [type(np.dtype(name)) for name in ("float16", "float32", "float64", "int64")]
    safe = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *types]
    try:
        with torch.serialization.safe_globals(safe):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"{path} is no whole checkpoint of nnU-Net ({reason}): {cure}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a dictionary, got a {type(content).__name__}: {cure}.")
    return content
