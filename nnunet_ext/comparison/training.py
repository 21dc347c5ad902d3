"""What the trainings of a run logged: epochs, times, learning curves, machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from nnunet_ext.comparison.run_folders import Run
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT
from nnunet_ext.nnunet.training_log import UNKNOWN, Curves, TrainingLog, read_log
from nnunet_ext.printable import counted


@dataclass(frozen=True)
class Training:
    """The trainings of one run.

    Args:
        logs: Fold -> what it left; of a deployed model what was noted when it was deployed.
        warnings: Sentences about what is missing or doubtful.
        other_checkpoint: Whether a validation is, or may be, of another checkpoint than the final one.
    """

    logs: Mapping[str, TrainingLog]
    warnings: tuple[str, ...] = ()
    other_checkpoint: bool = False

    @property
    def is_known(self) -> bool:
        """Whether the curves of all folds are."""
        return bool(self.logs) and all(log.curves is not None for log in self.logs.values())

    @property
    def curves(self) -> dict[str, Curves]:
        """Fold -> what it logged; folds without a readable checkpoint are missing."""
        return {fold: log.curves for fold, log in self.logs.items() if log.curves is not None}

    @property
    def epochs(self) -> tuple[int, ...]:
        """Different numbers of logged epochs, sorted."""
        return tuple(sorted({len(curves.dice) for curves in self.curves.values()}))

    @property
    def iterations(self) -> int | None:
        """Training iterations per epoch; None where unknown or not the same in all folds."""
        found = {log.iterations for log in self.logs.values()}
        return found.pop() if len(found) == 1 else None

    @property
    def machines(self) -> list[str]:
        """GPU and PyTorch of the trainings, each once."""
        return list(dict.fromkeys(log.machine for log in self.logs.values()))

    @property
    def seconds_per_epoch(self) -> float | None:
        """Median over all epochs of all folds."""
        seconds = [value for curves in self.curves.values() for value in curves.seconds]
        return median(seconds) if seconds else None


def read_training(run: Run) -> Training:
    """Read checkpoints and debug.json of the compared folds; what can't be read becomes a warning."""
    if run.deployed is not None:
        return Training({fold: run.deployed.logs.get(fold, UNKNOWN) for fold in run.folds})
    logs, warnings = {}, []
    for fold in run.folds:
        folder = run.fold_folder(fold)
        logs[fold], problems = read_log(folder)
        warnings += [f"{run.label}: {problem}" for problem in problems]
        warnings += _doubts(run, folder, fold, logs[fold])
    unfinished = [fold for fold in run.folds_with() if fold not in run.folds and fold != "all"]
    if unfinished:
        warnings.append(
            f"{run.label}: folds {', '.join(unfinished)} are not compared (no validation, or not asked for)."
        )
    doubtful = any(_is_of_other_checkpoint(run.fold_folder(fold)) for fold in run.folds)
    return Training(logs, tuple(warnings), doubtful)


def _is_of_other_checkpoint(folder: Path) -> bool:
    return not (folder / FINAL_CHECKPOINT).is_file() or len(set(logged_validations(folder))) > 1


def _doubts(run: Run, folder: Path, fold: str, log: TrainingLog) -> list[str]:
    """Reasons to doubt that a fold is what it seems."""
    doubts = []
    if log.is_unfinished:
        done, planned = len(log.curves.dice if log.curves else ()), counted(log.epochs or 0, "epoch")
        doubts.append(f"{run.label}, fold {fold}: unfinished, {done} of {planned} logged.")
    if not (folder / FINAL_CHECKPOINT).is_file() and log.curves is not None:
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
