"""What the trainings of a run logged: epochs, times, learning curves, machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from nnunet_ext.comparison.run_folders import Run
from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT, read_checkpoint
from nnunet_ext.printable import counted

_CHECKPOINTS = (FINAL_CHECKPOINT, "checkpoint_latest.pth", "checkpoint_best.pth")


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What one training logged, one value per epoch; `dice` is of nnU-Net's random validation patches."""

    training_loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    dice: tuple[float, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Training:
    """The trainings of one run.

    Args:
        curves: Fold -> what it logged; folds without a readable checkpoint are missing.
        machines: Fold -> GPU (or "cpu"), PyTorch; from debug.json.
        planned_epochs: Number of epochs of each fold that debug.json tells.
        iterations: Training iterations per epoch, None where unknown or not the same in all folds.
        warnings: Sentences about what is missing or doubtful.
    """

    curves: Mapping[str, Curves]
    machines: Mapping[str, str]
    planned_epochs: Mapping[str, int]
    iterations: int | None
    warnings: tuple[str, ...]

    @property
    def epochs(self) -> tuple[int, ...]:
        """Different numbers of logged epochs, sorted."""
        return tuple(sorted({len(curves.dice) for curves in self.curves.values()}))

    @property
    def seconds_per_epoch(self) -> float | None:
        """Median over all epochs of all folds."""
        seconds = [value for curves in self.curves.values() for value in curves.seconds]
        return median(seconds) if seconds else None


def read_training(run: Run) -> Training:
    """Read checkpoints and debug.json of the compared folds; what can't be read becomes a warning."""
    curves, machines, planned = {}, {}, {}
    iterations, warnings = set(), []
    for fold in run.folds:
        folder = run.fold_folder(fold)
        try:
            curves[fold] = read_curves(folder)
        except UsageError as error:
            warnings.append(f"{run.label}: {error}")
        try:
            debug = read_json(folder / "debug.json", "epochs and GPU of this fold stay unknown")
        except UsageError as error:
            warnings.append(f"{run.label}: {error}")
            debug = {}
        device = debug.get("gpu_name", debug.get("device", "unknown device"))
        machines[fold] = f"{device}, PyTorch {debug.get('torch_version', 'unknown')}"
        if str(debug.get("num_epochs", "")).isdecimal():
            planned[fold] = int(debug["num_epochs"])
        iterations.add(str(debug.get("num_iterations_per_epoch", "")))
        warnings += _doubts(run, folder, fold, curves.get(fold), planned.get(fold))
    unfinished = [fold for fold in run.folds_with() if fold not in run.folds and fold != "all"]
    if unfinished:
        warnings.append(
            f"{run.label}: folds {', '.join(unfinished)} are not compared (no validation, or not asked for)."
        )
    only = iterations.pop() if len(iterations) == 1 else ""
    return Training(curves, machines, planned, int(only) if only.isdecimal() else None, tuple(warnings))


def read_curves(folder: Path) -> Curves:
    """Read what a fold logged from its last checkpoint, without running code that the file may hold.

    Raises:
        UsageError: there is no checkpoint, or it is cut off or not of nnU-Net.
    """
    path = next((folder / name for name in _CHECKPOINTS if (folder / name).is_file()), None)
    if path is None:
        raise UsageError(f"{folder} has no checkpoint: its learning curves and times are missing here.")
    cure = "copy it again; its learning curves and times are missing here"
    try:
        log = read_checkpoint(path, cure)["logging"]
        times = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
        return Curves(
            training_loss=tuple(map(float, log["train_losses"])),
            validation_loss=tuple(map(float, log["val_losses"])),
            dice=tuple(map(float, log["mean_fg_dice"])),
            seconds=tuple(float(end - start) for start, end in times),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is not a complete checkpoint of nnU-Net ({error}): {cure}.") from error


def _doubts(run: Run, folder: Path, fold: str, curves: Curves | None, planned: int | None) -> list[str]:
    """Reasons to doubt that a fold is what it seems."""
    doubts = []
    if curves is not None and planned is not None and len(curves.dice) < planned:
        doubts.append(
            f"{run.label}, fold {fold}: unfinished, {len(curves.dice)} of {counted(planned, 'epoch')} logged."
        )
    if not (folder / FINAL_CHECKPOINT).is_file() and curves is not None:
        doubts.append(
            f"{run.label}, fold {fold}: there is no {FINAL_CHECKPOINT}, the validation is of another checkpoint "
            "(best or latest)."
        )
    logged = logged_validations(folder)
    if len(set(logged)) > 1:
        doubts.append(
            f"{run.label}, fold {fold}: validated more than once with different results (mean Dice "
            f"{', '.join(f'{value:.4f}' for value in logged)}); the last may be of checkpoint_best (--val_best)."
        )
    if fold == "all":
        doubts.append(f"{run.label}: fold_all validates on the cases that it was trained on.")
    return doubts


def logged_validations(folder: Path) -> list[float]:
    """Mean validation Dice of every validation in the training logs, in their order."""
    found: list[float] = []
    for path in sorted(path for path in folder.glob("training_log_*.txt") if path.is_file()):
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [float(value) for value in re.findall(r"Mean Validation Dice:\s+([\d.]+)", text)]
    return found
