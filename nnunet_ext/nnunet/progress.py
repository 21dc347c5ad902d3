"""How far the training of a fold is, by the text that nnU-Net writes while it trains."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median

from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json

_READ = 200_000  # bytes at the end of a log; an epoch writes some 500
_RUNS = 50  # logs that are read at most
_RECENT = 5  # epochs that tell how long one takes, and whether the loss is lost
_ENDED = "Training done."


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A training that runs, or has ended.

    Args:
        epoch: Epochs that have ended, of all its runs.
        epochs: Planned epochs; None where nnU-Net has not said yet.
        seconds: Median of the last epochs; None before the first.
        losses: Training losses of the last epochs, NaN included.
        is_validating: Whether the last epoch has ended and the validation cases are predicted.
    """

    epoch: int
    epochs: int | None
    seconds: float | None
    losses: tuple[float, ...]
    is_validating: bool

    @property
    def seconds_left(self) -> float | None:
        """Until the last epoch ends; None where it can't be told."""
        if self.epochs is None or self.seconds is None:
            return None
        return max(0, self.epochs - self.epoch) * self.seconds

    @property
    def is_diverged(self) -> bool:
        """Whether the loss of the last epochs, or of all that there are at the end, is no number.

        One such epoch is none: under float16 nnU-Net's scaler skips steps that overflow, and the weights stay.
        """
        enough = len(self.losses) >= _RECENT or (self.is_validating and bool(self.losses))
        return enough and not any(map(isfinite, self.losses))


def read_progress(fold: Path) -> Progress | None:
    """Read the newest logs in the folder of a fold; None where no training has begun there."""
    logs = sorted(fold.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if not logs:
        return None
    text = ""
    for log in reversed(logs[-_RUNS:]):  # each start of a training begins a new one
        text = _end_of(log) + text
        if text.count("train_loss") >= _RECENT:
            break
    *_, last = (None, *re.finditer(r"Epoch (\d+) *$", text, flags=re.MULTILINE))
    since = text[last.end() :] if last else text
    times = [float(number) for number in re.findall(r"Epoch time: ([\d.]+) s", text)]
    losses = [float(number) for number in re.findall(r"train_loss (-?(?:[\d.]+(?:e[-+]?\d+)?|nan|inf))", text)]
    return Progress(
        epoch=int(last[1]) + ("Epoch time" in since) if last else 0,
        epochs=_epochs(fold),
        seconds=median(times[-_RECENT:]) if times else None,
        losses=tuple(losses[-_RECENT:]),
        is_validating=_ENDED in since,
    )


def _end_of(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _READ))
        return stream.read().decode("utf-8", errors="replace")


def _epochs(fold: Path) -> int | None:
    """Planned epochs, as nnU-Net notes them where the training begins."""
    try:
        return int(read_json(fold / "debug.json", "train again")["num_epochs"])
    except (UsageError, KeyError, ValueError, TypeError):
        return None
