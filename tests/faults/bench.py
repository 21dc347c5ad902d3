"""What all classes of faults share: data, random numbers, undisturbed trainings, and the look at a fold afterwards."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from nnunet_ext.errors import UsageError
from nnunet_ext.files import PARTIAL
from nnunet_ext.trainers.fold_lock import only_training
from nnunet_ext.whole import check_whole, is_whole
from tests.faults.outcome import Outcome
from tests.faults.processes import Ended, run
from tests.faults.training import Training, digest
from tests.faults.triggers import AtCall, Trigger

# In the order in which nnU-Net looks for what `--c` continues.
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
_EXPECTED = {"checkpoint_final.pth", "checkpoint_best.pth", "training.lock", "debug.json", "validation"}


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """A training that nothing happened to.

    Args:
        digests: Epoch -> digest of weights and moments after it.
        best: Digest of its best checkpoint.
        size: Bytes of a checkpoint.
        calls: Calls of functions, from the first epoch to the last save.
    """

    digests: dict[int, str]
    best: str
    size: int
    calls: int


@dataclass
class Bench:
    """Where faults are injected.

    Args:
        folder: For all that is written.
        dataset: Number of the data set.
        draw: Random numbers.
        is_short: Whether a few faults of each kind are enough.
        known: Undisturbed trainings, by trainer and ranks.
    """

    folder: Path
    dataset: int
    draw: random.Random
    is_short: bool
    known: dict[tuple[str, int], Undisturbed] = field(default_factory=dict)
    _numbers: Any = field(default_factory=count)

    def training(self, trainer: str, **options: Any) -> Training:
        """A training in a new folder of results."""
        results = self.folder / f"results{next(self._numbers)}"
        results.mkdir()
        return Training(results=results, dataset=self.dataset, trainer=trainer, **options)

    def run(self, job: Callable[[], object], limit: float = 120.0) -> Ended:
        """Run it in a process of its own."""
        return run(job, self.log(), limit)

    def log(self) -> Path:
        """A new file."""
        return self.folder / f"{next(self._numbers)}.log"

    def undisturbed(self, trainer: str, ranks: int = 1) -> Undisturbed:
        """The same training, left alone."""
        key = (trainer, ranks)
        if key not in self.known:
            self.known[key] = self._measure(self.training(trainer, ranks=ranks, trigger=AtCall(0)))
        return self.known[key]

    def _measure(self, training: Training) -> Undisturbed:
        ended = self.run(training)
        if ended.status:
            raise RuntimeError(f"an undisturbed training failed:\n{ended.text[-3000:]}")
        told = training.told()
        final, best = (training.folder / f"checkpoint_{name}.pth" for name in ("final", "best"))
        return Undisturbed(
            digests={note["epoch"]: note["digest"] for note in told if "digest" in note},
            best=content_digest(read(best)),
            size=final.stat().st_size,
            calls=max((note["ticks"] for note in told if "ticks" in note), default=0),
        )

    def check(self, training: Training, outcome: Outcome, fault: str) -> int:
        """Look at all checkpoints of a fold after a fault; return the epoch that `--c` must begin with."""
        told = training.told()
        for path in sorted(training.folder.glob("checkpoint_*.pth")):
            self._check_file(path, told, outcome, fault)
        saved = max((note["epoch"] for note in told if "saved" in note), default=0)
        whole = [path for name in CHECKPOINTS if is_whole(path := training.folder / name)]
        reached = max((read(path)["current_epoch"] for path in whole), default=0)
        if reached < saved:
            outcome.problem("epochs lost", f"{fault}: {saved} saved, {reached} there")
        partials = [path for path in training.folder.iterdir() if path.name.startswith(PARTIAL)]
        if len(partials) > 1:
            outcome.problem("files left", f"{fault}: {len(partials)} partial files")
        for path in training.model.glob("*.json"):
            if not is_whole(path):
                outcome.observed[f"{path.name} cut off, written anew by the next start"] += 1
        return int(reached)

    def _check_file(self, path: Path, told: list[dict[str, Any]], outcome: Outcome, fault: str) -> None:
        try:
            check_whole(path)
            content = read(path)
        except Exception as error:
            outcome.problem("unrecoverable", f"{fault}: {path.name}: {error}")
            return
        epoch, found = content["current_epoch"], content_digest(content)
        if not all(torch.isfinite(t).all() for t in content["network_weights"].values()):
            outcome.problem("silently wrong", f"{fault}: {path.name} holds numbers that are not finite")
        if found not in {note["digest"] for note in told if note.get("epoch") == epoch and "digest" in note}:
            outcome.problem(
                "silently wrong", f"{fault}: {path.name} says epoch {epoch}, its weights are of another one"
            )
        if len(content["logging"]["ema_fg_dice"]) != epoch:
            outcome.problem("silently wrong", f"{fault}: {path.name} says epoch {epoch}, its curves another one")

    def check_begin(self, training: Training, before: int, reached: int, outcome: Outcome, fault: str) -> None:
        """See that a continuation began with the epoch after the one that was reached.

        Args:
            training: The fold.
            before: How many notes there were when it began.
            reached: The epoch.
            outcome: Where to note problems.
            fault: The fault before.
        """
        begun = [n["begins"] for n in training.told()[before:] if "begins" in n and n["rank"] == 0]
        if begun and begun[0] != reached:
            outcome.problem("epochs lost", f"{fault}: continued with epoch {begun[0]}, not {reached}")

    def finish(self, training: Training, outcome: Outcome, fault: str, is_repeatable: bool = True) -> None:
        """Continue to the end, and compare with an undisturbed training."""
        reached = self.check(training, outcome, fault) if training.folder.exists() else 0
        before = len(training.told())
        ended = self.run(replace(training, trigger=Trigger()))
        self.check_begin(training, before, reached, outcome, fault)
        self.check_end(training, ended, outcome, fault, is_repeatable)

    def check_end(
        self, training: Training, ended: Ended, outcome: Outcome, fault: str, is_repeatable: bool = True
    ) -> None:
        """See that a training has ended as one that nothing happened to."""
        note_end(ended, outcome, fault)
        final = training.folder / "checkpoint_final.pth"
        if ended.status or not final.exists():
            outcome.problem("unrecoverable", f"{fault}: can't be continued: {ended.last_line}")
            return
        self.check(training, outcome, fault)
        content, epochs = read(final), training.epochs
        if content["current_epoch"] != epochs:
            outcome.problem("silently wrong", f"{fault}: ended with epoch {content['current_epoch']} of {epochs}")
        if is_repeatable:
            like = self.undisturbed(training.trainer, training.ranks)
            if content_digest(content) != like.digests[epochs]:
                outcome.problem("silently wrong", f"{fault}: the final weights are not the undisturbed ones")
            if content_digest(read(training.folder / "checkpoint_best.pth")) != like.best:
                outcome.problem("silently wrong", f"{fault}: the best weights are not the undisturbed ones")
        names = {path.name for path in training.folder.iterdir() if not path.name.startswith("training_log")}
        if odd := names - _EXPECTED:
            outcome.problem("files left", f"{fault}: {sorted(odd)}")
        try:
            with only_training(training.folder):
                pass
        except UsageError as error:
            outcome.problem("files left", f"{fault}: {error}")

    def tidy(self, training: Training) -> None:
        """Delete what it has written."""
        shutil.rmtree(training.results, ignore_errors=True)


def read(path: Path) -> dict[str, Any]:
    """Content of a checkpoint, as nnU-Net reads it."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return content


def content_digest(content: dict[str, Any]) -> str:
    """Digest of what a checkpoint holds."""
    return digest(content["network_weights"], content["optimizer_state"])


def note_end(ended: Ended, outcome: Outcome, fault: str) -> None:
    """Note a training that did not end, or left processes."""
    if ended.was_hung:
        outcome.problem("hung", fault)
    if ended.left:
        outcome.problem("processes left", f"{fault}: {ended.left}")
