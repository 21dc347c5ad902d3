"""The disk is full while a checkpoint, the log or a prediction of validation is written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet

from nnunet_ext.files import sha256
from tests.faults.bench import Bench, note_end
from tests.faults.outcome import Outcome
from tests.faults.processes import Ended
from tests.faults.training import HOST, Training
from tests.faults.triggers import AtEpoch, Limited, Trigger

TRAINER = "nnUNetTrainer_8epochs_1iters"
_LATEST, _FINAL = "checkpoint_latest.pth", "checkpoint_final.pth"
_SIZE = "6m"  # of the file system: some checkpoints


def disk(bench: Bench) -> Outcome:
    """Fill a small file system, or where none can be mounted limit the size of files."""
    outcome = Outcome()
    for _ in range(1 if bench.is_short else 6):
        _limited(bench, outcome)
    for share in () if bench.is_short else (0.3, 0.6, 0.9):
        _prediction_cut_off(bench, outcome, share)
    try:
        with _mounted(bench.folder / "disk"):
            for _ in range(1 if bench.is_short else 8):
                _full_at_save(bench, outcome)
            for _ in range(0 if bench.is_short else 4):
                _full_at_log(bench, outcome)
            for _ in range(0 if bench.is_short else 4):
                _full_at_validation(bench, outcome)
    except (OSError, subprocess.CalledProcessError):
        outcome.observed["no file system could be mounted"] += 1
    return outcome


@contextmanager
def _mounted(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(folder)], check=True, capture_output=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _limited(bench: Bench, outcome: Outcome) -> None:
    size = bench.undisturbed(TRAINER).size
    trigger = Limited(2 + bench.draw.randrange(4), int(size * (0.1 + 0.8 * bench.draw.random())))
    training = bench.training(TRAINER, trigger=trigger)
    kind = "file too large at a checkpoint"
    fault = f"{kind}: save {trigger.save}, {trigger.size} bytes"
    outcome.injected[kind] += 1
    _see_save(bench.run(training), outcome, fault)
    bench.finish(training, outcome, fault)
    bench.tidy(training)


def _on_disk(bench: Bench, **options: Any) -> Training:
    """A training whose results lie on the small file system; the earlier ones there are deleted."""
    training = bench.training(TRAINER, **options)
    training.results.rmdir()
    results = bench.folder / "disk" / training.results.name
    results.mkdir()
    return replace(training, results=results, told_in=bench.folder)


def _fill(bench: Bench, left: int) -> Path:
    """Write a file that leaves so many bytes."""
    path = bench.folder / "disk" / "other"
    free = os.statvfs(path.parent)
    with path.open("wb") as stream:
        stream.write(b"0" * max(0, free.f_bavail * free.f_frsize - left))
    return path


def _full_at_save(bench: Bench, outcome: Outcome) -> None:
    kind = "disk full at a checkpoint"
    training = _on_disk(bench, trigger=AtEpoch(2 + bench.draw.randrange(4)))
    bench.run(training)
    left = 2**17 + int(bench.draw.random() * bench.undisturbed(TRAINER).size * 0.7)
    _full(bench, training, left, kind, outcome)


def _full_at_log(bench: Bench, outcome: Outcome) -> None:
    """No byte is left: not for the log either, which is no reason to end, but then for a checkpoint."""
    training = _on_disk(bench, trigger=AtEpoch(2 + bench.draw.randrange(4)))
    bench.run(training)
    _full(bench, training, bench.draw.choice([0, 4096, 8192]), "disk full at the log", outcome)


def _full(bench: Bench, training: Training, left: int, kind: str, outcome: Outcome) -> None:
    path = training.folder / _LATEST
    before, other = sha256(path), _fill(bench, left)
    fault = f"{kind}: {left} bytes left"
    outcome.injected[kind] += 1
    patient = (lambda: patch(f"{HOST}.sleep"),)  # nnU-Net waits 2.5 s for each line
    ended = bench.run(replace(training, trigger=Trigger(), changes=patient))
    _see_save(ended, outcome, fault)
    if sha256(path) != before:
        outcome.problem("files left", f"{fault}: the old checkpoint has changed")
    other.unlink()
    bench.finish(training, outcome, fault)
    bench.tidy(training)


def _see_save(ended: Ended, outcome: Outcome, fault: str) -> None:
    note_end(ended, outcome, fault)
    words = ("can't write", "--c")
    if ended.status == 0 or not all(word in ended.last_line for word in words):
        outcome.problem("unclear", f"{fault}: {ended.status}, {ended.last_line}")


def _prediction_cut_off(bench: Bench, outcome: Outcome, share: float) -> None:
    """ITK says nothing of the end of a file that it can't write."""
    kind = "prediction of validation cut off"
    training = bench.training(TRAINER)
    bench.run(training)
    validation = replace(training, arguments=("--val",), validates=True)
    bench.run(validation)
    predicted, summary = training.folder / "validation", training.folder / "validation" / "summary.json"
    size = max(path.stat().st_size for path in predicted.glob("*.nii.gz"))
    fault = f"{kind}: {int(share * size)} of {size} bytes"
    ended = bench.run(replace(validation, changes=(lambda: _cut_predictions(int(share * size)),)))
    outcome.injected[kind] += 1
    _see_validation(ended, outcome, fault)
    if summary.exists():
        outcome.problem("silently wrong", f"{fault}: it has scores")
    again = bench.run(validation)
    if again.status or not summary.is_file():
        outcome.problem("unrecoverable", f"{fault}: {again.last_line}")
    bench.tidy(training)


@contextmanager
def _cut_predictions(size: int) -> Iterator[None]:
    """Predictions are as ITK leaves them on a full disk: their last buffer is missing."""
    export = nnunet.export_prediction_from_logits

    def cut(*arguments: Any) -> None:
        export(*arguments)
        os.truncate(f"{arguments[5]}.nii.gz", size)

    with patch.object(nnunet, "export_prediction_from_logits", cut):
        yield


def _see_validation(ended: Ended, outcome: Outcome, fault: str) -> None:
    note_end(ended, outcome, fault)
    if ended.status == 0 or "can't write" not in ended.last_line or "--val" not in ended.last_line:
        outcome.problem("unclear", f"{fault}: {ended.status}, {ended.last_line}")


def _full_at_validation(bench: Bench, outcome: Outcome) -> None:
    kind = "disk full at the predictions of validation"
    training = _on_disk(bench)
    bench.run(training)
    final = training.folder / _FINAL
    left = bench.draw.choice([0, 4096])
    before, other = sha256(final), _fill(bench, left)
    fault = f"{kind}: {left} bytes left"
    validation = replace(training, arguments=("--val",), validates=True, changes=(lambda: patch(f"{HOST}.sleep"),))
    ended = bench.run(validation)
    outcome.injected[kind] += 1
    _see_validation(ended, outcome, fault)
    if sha256(final) != before:
        outcome.problem("files left", f"{fault}: the checkpoint has changed")
    other.unlink()
    again = bench.run(validation)
    if again.status or not (training.folder / "validation" / "summary.json").is_file():
        outcome.problem("unrecoverable", f"{fault}: {again.last_line}")
    bench.tidy(training)
