"""What a training left of itself in the folder of its fold: length, learning curves, times, machine, augmentation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT, read_checkpoint

_SERIES = ("training_loss", "validation_loss", "dice", "seconds")
_CHECKPOINTS = (FINAL_CHECKPOINT, "checkpoint_latest.pth", "checkpoint_best.pth")
# From this release on batchgeneratorsv2 rotates and scales by the matrix that is meant, not by its transpose.
TURNED = Version("0.3.4")
TURNED_ON = datetime(2026, 7, 2, tzinfo=timezone.utc)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What one training logged, one value per epoch; `dice` is of nnU-Net's random validation patches."""

    training_loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    dice: tuple[float, ...]
    seconds: tuple[float, ...]
    started: float | None = None  # seconds since 1970


@dataclass(frozen=True, kw_only=True)
class TrainingLog:
    """The training of one fold.

    Args:
        curves: What its checkpoint logged; None where there is none.
        epochs, iterations: Planned epochs and training iterations of each, from debug.json.
        machine: GPU (or "cpu") and PyTorch.
        augmentation: Version of batchgeneratorsv2, which trainers of this package note; None where nobody did.
    """

    curves: Curves | None
    epochs: int | None
    iterations: int | None
    machine: str
    augmentation: str | None

    @property
    def trained(self) -> int | None:
        """Iterations that were trained."""
        return None if self.curves is None or self.iterations is None else len(self.curves.dice) * self.iterations

    @property
    def is_unfinished(self) -> bool:
        """Whether fewer epochs were logged than planned."""
        return self.curves is not None and self.epochs is not None and len(self.curves.dice) < self.epochs

    @property
    def is_turned(self) -> bool | None:
        """Whether augmentation was that of `TURNED` and later: by the version, else by the date; None: unknown."""
        try:
            return Version(self.augmentation or "") >= TURNED
        except InvalidVersion:
            started = self.curves.started if self.curves else None
        try:
            return None if started is None else datetime.fromtimestamp(started, timezone.utc) >= TURNED_ON
        except (ValueError, OverflowError, OSError):  # no date
            return None


UNKNOWN = TrainingLog(curves=None, epochs=None, iterations=None, machine="unknown device", augmentation=None)


def read_log(folder: Path) -> tuple[TrainingLog, list[str]]:
    """Read checkpoint and debug.json of a fold; what can't be read is told in sentences."""
    problems = []
    curves, debug = None, {}
    try:
        curves = read_curves(folder)
    except UsageError as error:
        problems.append(str(error))
    try:
        debug = read_json(folder / "debug.json", "epochs and GPU of this fold stay unknown")
    except UsageError as error:
        problems.append(str(error))
    device = debug.get("gpu_name", debug.get("device", "unknown device"))
    log = TrainingLog(
        curves=curves,
        epochs=_count(debug.get("num_epochs")),
        iterations=_count(debug.get("num_iterations_per_epoch")),
        machine=f"{device}, PyTorch {debug.get('torch_version', 'unknown')}",
        augmentation=_text(debug.get("batchgeneratorsv2_version")),
    )
    return log, problems


def record(log: TrainingLog) -> dict[str, Any]:
    """The log for JSON, which has no NaN."""
    fields = asdict(log)
    for key in _SERIES if fields["curves"] else ():
        fields["curves"][key] = [value if math.isfinite(value) else None for value in fields["curves"][key]]
    return fields


def log_of(record: Any) -> TrainingLog | None:
    """The log of a `record`; None of anything else."""
    try:
        curves = record["curves"] and Curves(
            **{key: tuple(map(_nan, record["curves"][key])) for key in _SERIES},
            started=record["curves"]["started"] and float(record["curves"]["started"]),
        )
        return TrainingLog(
            curves=curves,
            epochs=_count(record["epochs"]),
            iterations=_count(record["iterations"]),
            machine=str(record["machine"]),
            augmentation=_text(record["augmentation"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _count(text: Any) -> int | None:
    return (int(text) or None) if str(text).isdecimal() else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


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
        return _curves(read_checkpoint(path, cure)["logging"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is not a complete checkpoint of nnU-Net ({error}): {cure}.") from error


def _curves(log: Mapping[str, Sequence[Any]]) -> Curves:
    starts = [float(start) for start in log["epoch_start_timestamps"]]
    ends = [float(end) for end in log["epoch_end_timestamps"]]
    return Curves(
        training_loss=tuple(map(float, log["train_losses"])),
        validation_loss=tuple(map(float, log["val_losses"])),
        dice=tuple(map(float, log["mean_fg_dice"])),
        seconds=tuple(end - start for start, end in zip(starts, ends, strict=False)),
        started=starts[0] if starts else None,
    )
