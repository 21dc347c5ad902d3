"""The training of a fold, as a step of a cross-validation."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nnunet_ext import registry
from nnunet_ext.cluster.request import Method
from nnunet_ext.cluster.step import Step
from nnunet_ext.cluster.work import CommandKilledError, Commands, StepError
from nnunet_ext.nnunet.checkpoints import (
    BEST_CHECKPOINT,
    FINAL_CHECKPOINT,
    LATEST_CHECKPOINT,
    SAVE_REQUEST,
    whole_checkpoints,
)
from nnunet_ext.nnunet.progress import Progress, read_progress
from nnunet_ext.nnunet.splits import validation_cases
from nnunet_ext.whole import is_whole

_LOOK = 10.0  # seconds between two looks at a training's loss
_ENDING = 60.0  # seconds in which Slurm kills what it has asked to end


@dataclass(frozen=True, kw_only=True)
class Training(Step):
    """A fold, trained and validated."""

    method: Method
    configuration: str
    fold: int
    next_stage: str | None = None

    @property
    def gpus(self) -> int:
        """GPUs that it takes."""
        return self.asked.gpus

    @property
    def model(self) -> Path:
        """Results of the training with all folds."""
        name = f"{self.method.trainer}__{self.method.plans}__{self.configuration}"
        return self.asked.results / self.dataset / name

    @property
    def folder(self) -> Path:
        """Results of the fold."""
        return self.model / f"fold_{self.fold}"

    @property
    def lock(self) -> Path:
        """One training at a time works in the folder, whatever cross-validation it belongs to."""
        return self.folder / "cross_validation.lock"

    @property
    def progress(self) -> Progress | None:
        """How far it is."""
        return read_progress(self.folder)

    def is_done(self) -> bool:
        """Whether it is trained and validated, has not diverged, and the next stage has all that it needs."""
        trained, validated = _written(self.folder / FINAL_CHECKPOINT), self.folder / "validation" / "summary.json"
        if not trained or _written(validated) < trained or not is_whole(validated):
            return False
        progress = self.progress
        return not (progress and progress.is_diverged) and self._has_told_next_stage()

    def _has_told_next_stage(self) -> bool:
        """Whether each validation case is there as the prior of the next stage."""
        folder = self.model / "predicted_next_stage" / str(self.next_stage)
        splits = validation_cases(self.asked.preprocessed / self.dataset) if self.next_stage else []
        cases = splits[self.fold] if self.fold < len(splits) else []
        return all(any((folder / f"{case}{end}").is_file() for end in (".b2nd", ".npz")) for case in cases)

    def work(self, commands: Commands) -> None:
        """Train, or go on where a checkpoint lies; again after a kill, unless the second try gets no further.

        Raises:
            StepError: it failed, or its loss is lost.
        """
        tries = 0  # that have got no further
        while True:
            before = self.mark()
            try:
                commands.run(self._command(), self._watcher())
                self.see_loss()
                return
            except CommandKilledError as error:
                if error.number == signal.SIGTERM:  # Slurm says so to all processes before it kills them
                    time.sleep(_ENDING)
                tries = 0 if self.mark() != before else tries + 1
                if tries == 2:
                    raise

    def _command(self) -> list[str]:
        options = ["-tr", self.method.trainer, "-p", self.method.plans, "-device", self.asked.device]
        options += ["-num_gpus", str(self.gpus)] if self.gpus > 1 else []
        options += ["--npz"] if self.asked.npz else []
        there = whole_checkpoints(self.folder)
        if there:
            options.append("--val" if FINAL_CHECKPOINT in there else "--c")
        return ["nnUNetv2_train", self.dataset, self.configuration, str(self.fold), *options]

    def mark(self) -> tuple[str, int] | None:
        """The checkpoint that nnU-Net would go on from, and when it was written: a run that gets further changes it."""
        paths = (self.folder / name for name in (FINAL_CHECKPOINT, LATEST_CHECKPOINT, BEST_CHECKPOINT))
        return next(((path.name, written) for path in paths if (written := _written(path))), None)

    def see_loss(self) -> None:
        """See that the training has not diverged.

        Raises:
            StepError: the loss of its last epochs is no number.
        """
        progress = self.progress
        if progress and progress.is_diverged:
            raise StepError(
                f"diverged: the training loss of the last {len(progress.losses)} epochs until {progress.epoch} is no "
                f"number; delete {self.folder} to train it again"
            )

    def _watcher(self) -> Callable[[], None]:
        """Look at the loss now and then: epochs after it is lost are wasted."""
        next_look = [time.monotonic() + _LOOK]

        def watch() -> None:
            if time.monotonic() > next_look[0]:
                next_look[0] = time.monotonic() + _LOOK
                self.see_loss()

        return watch

    def save(self, seconds: float) -> None:
        """Ask a training that runs for a checkpoint where its epoch ends, and wait for it as long as there is time.

        Trainers of this package heed it; others go on from what they have saved by themselves.
        """
        schedule = registry.parse_schedule(self.method.trainer)
        name = schedule.base if schedule else self.method.trainer
        if name not in registry.names("trainers") and not (schedule and name == registry.CORE_TRAINER):
            return
        request, latest = self.folder / SAVE_REQUEST, self.folder / LATEST_CHECKPOINT
        before = _written(latest)
        try:
            request.touch()
        except OSError:  # a full disk, on which no checkpoint could be written either
            return
        end = time.monotonic() + seconds
        while time.monotonic() < end and request.exists():
            time.sleep(0.2)
            if _written(latest) != before:
                break
        request.unlink(missing_ok=True)


def _written(path: Path) -> int:
    """When a file was written, in ns since 1970; 0 where there is none, or none any more."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
