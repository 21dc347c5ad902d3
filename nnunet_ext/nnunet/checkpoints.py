"""Checkpoints of nnU-Net, read without running code that the file may hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ext.errors import UsageError
from nnunet_ext.files import check_regular, writing
from nnunet_ext.whole import check_whole

FINAL_CHECKPOINT = "checkpoint_final.pth"  # what nnU-Net writes at the end of a training
LATEST_CHECKPOINT, BEST_CHECKPOINT = "checkpoint_latest.pth", "checkpoint_best.pth"
# A file of this name in a fold's folder asks trainers of this package for a checkpoint where the epoch ends.
SAVE_REQUEST = "save_checkpoint"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a checkpoint says of the model that it belongs to.

    Args:
        trainer, configuration, fold: Names.
        weights: Weights of the network.
        mirroring_axes: Axes that prediction may mirror.
    """

    trainer: str
    configuration: str
    fold: str
    weights: Mapping[str, Any]
    mirroring_axes: tuple[int, ...] | None


def whole_checkpoints(fold: Path) -> list[str]:
    """Names of a fold's checkpoints that can be read to their end; those that were cut off are renamed to .damaged.

    Raises:
        UsageError: one can't be read now, or not be renamed.
    """
    names = []
    for path in sorted(fold.glob("checkpoint_*.pth")):
        with writing(path):
            try:
                check_whole(path)
                names.append(path.name)
            except ValueError:
                path.replace(path.with_name(f"{path.name}.damaged"))
    return names


def read_trained(path: Path, cure: str) -> Trained:
    """Read a checkpoint that predicts; see `read_checkpoint`.

    Raises:
        UsageError: it is cut off, or does not hold what nnU-Net's predictor needs.
    """
    checkpoint = read_checkpoint(path, cure)
    arguments, axes = checkpoint.get("init_args"), checkpoint.get("inference_allowed_mirroring_axes")
    found: dict[str, tuple[Any, Any]] = {
        "trainer_name": (checkpoint.get("trainer_name"), str),
        "init_args": (arguments, Mapping),
        "configuration": (arguments.get("configuration") if isinstance(arguments, Mapping) else "", str),
        "network_weights": (checkpoint.get("network_weights"), Mapping),
        "inference_allowed_mirroring_axes": (() if axes is None else axes, (tuple, list)),
    }
    wrong = [key for key, (value, kind) in found.items() if not isinstance(value, kind)]
    if wrong or not all(isinstance(axis, int) for axis in axes or ()):
        raise UsageError(
            f"{path} must hold what nnU-Net 2 stores in a checkpoint, it lacks {', '.join(wrong) or 'axes'} or has "
            f"something else there: {cure}."
        )
    return Trained(
        trainer=checkpoint["trainer_name"],
        configuration=checkpoint["init_args"]["configuration"],
        fold=str(checkpoint["init_args"].get("fold")),
        weights=checkpoint["network_weights"],
        mirroring_axes=None if axes is None else tuple(axes),
    )


def _refuse_script(path: Path) -> None:
    """Refuse a TorchScript archive, which `torch.load` runs before PyTorch 2.6, whatever `weights_only` says."""
    import torch

    if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise ValueError("it is a TorchScript archive, a program")


# What NumPy 1 and NumPy 2 call the module whose `scalar` a pickled number asks for.
_MODULES_OF_SCALAR = ("numpy.core.multiarray", "numpy._core.multiarray")


def read_checkpoint(path: Path, cure: str) -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`; nnU-Net stores tensors and numbers of NumPy, and nothing else.

    Args:
        path: File to read.
        cure: What to do when it can't be read, as the end of a sentence.

    Raises:
        UsageError: it is cut off, holds anything else, or is no checkpoint.
    """
    import torch

    check_regular(path, cure)
    try:
        _refuse_script(path)
        with torch.serialization.safe_globals(_numbers_of_numpy()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a foreign file makes the unpickler meet
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"{path} is not a complete checkpoint of nnU-Net ({reason}): {cure}.") from error
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
