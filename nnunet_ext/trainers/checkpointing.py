"""Checkpoints that a kill, a full disk or a second training can't spoil."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ext.files import remove_partials, whole_file
from nnunet_ext.nnunet.checkpoints import SAVE_REQUEST
from nnunet_ext.trainers.continuing import check_continuable, check_places, latest_of
from nnunet_ext.trainers.explaining import check_predictions, explained
from nnunet_ext.trainers.fold_lock import only_training
from nnunet_ext.trainers.several_gpus import is_first

if TYPE_CHECKING:
    from nnunet_ext.protocols import HostTrainer
else:
    HostTrainer = object


class AtomicCheckpointMixin(HostTrainer):
    """Keeps the files that a run continues from whole, and its own.

    A checkpoint is written beside its place and renamed; one training at a time works in a fold's folder; the best
    result so far is known after a continuation. Stands before ``nnUNetTrainer`` in the bases of a trainer.
    """

    # The file that a training continues from, where it holds the best weights so far.
    _best_so_far: Path | None = None

    @property
    def batchgeneratorsv2_version(self) -> str:
        """For debug.json, where nnU-Net writes all attributes: releases augment differently."""
        return version("batchgeneratorsv2")

    def run_training(self) -> None:
        """Train as nnU-Net does, while no other training can write to this fold.

        Raises:
            UsageError: another training does, or the name of a checkpoint is taken.
        """
        folder = Path(self.output_folder)
        if not is_first(self):  # it writes, and holds the lock for all
            with explained(folder, "--c"):
                super().run_training()
            return
        with only_training(folder) as is_alone:
            check_places(folder)
            if not is_alone:
                self.print_to_log_file(
                    f"The file system of {folder} has no locks: see to it that no second training uses this folder."
                )
            remove_partials(folder, of_living=is_alone)
            (folder / SAVE_REQUEST).unlink(missing_ok=True)
            if self._best_so_far is not None:
                with self._replaced(folder / "checkpoint_best.pth") as part:
                    shutil.copyfile(self._best_so_far, part)
            with explained(folder, "--c"):
                super().run_training()

    def on_epoch_end(self) -> None:
        """Log and save as nnU-Net does, the latest checkpoint also where a file in the fold's folder asks for it.

        nnU-Net saves it every `save_every` epochs, 50 by default: what a cluster ends before would be lost.
        """
        request, usual = Path(self.output_folder) / SAVE_REQUEST, self.save_every
        is_asked = request.exists()
        self.save_every = 1 if is_asked else usual
        try:
            super().on_epoch_end()
        finally:
            self.save_every = usual
        if is_asked and is_first(self):
            request.unlink(missing_ok=True)

    def save_checkpoint(self, filename: str) -> None:
        """Save as nnU-Net does, atomically.

        Raises:
            OSError: it can't be written; the previous checkpoint stays.
        """
        if not is_first(self) or self.disable_checkpointing:  # nnU-Net writes nothing
            super().save_checkpoint(filename)
            return
        with self._replaced(Path(filename)) as part:
            super().save_checkpoint(str(part))

    @contextmanager
    def _replaced(self, path: Path) -> Iterator[Path]:
        """Give a name to write a checkpoint under; an error goes to the log too."""
        try:
            with whole_file(path) as part:
                yield part
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            sentence = _failure(path, error)
            self.print_to_log_file(sentence, also_print_to_console=False)
            raise OSError(sentence) from error  # the last line of the traceback

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does.

        Raises:
            UsageError: the disk is full, a prediction is cut off.
        """
        folder = Path(self.output_folder)
        with explained(folder, "--val"):
            super().perform_actual_validation(save_probabilities)
        if is_first(self):
            check_predictions(folder / "validation", self.dataset_json["file_ending"])

    def load_checkpoint(self, *arguments: Any, **options: Any) -> None:
        """Load as nnU-Net does, the best checkpoint where it is newer than the latest one that is asked for.

        The best moving average counts the epoch after which the file was written.

        nnU-Net writes ``checkpoint_latest.pth`` before it looks whether that epoch is the best: a kill between both
        leaves a ``checkpoint_best.pth`` of an earlier epoch, so that a training copies the file that it continues.

        Raises:
            UsageError: the file is damaged, or of another training.
        """
        source = arguments[0] if arguments else None
        if isinstance(source, str):
            if not self.was_initialized:
                self.initialize()
            check_continuable(Path(source), self)
            newest = latest_of(Path(source), self)
            if newest != Path(source):
                check_continuable(newest, self)
                source, arguments = str(newest), (str(newest), *arguments[1:])
        super().load_checkpoint(*arguments, **options)
        noted, logged = self._best_ema, self.logger.get_checkpoint()["ema_fg_dice"]
        values = [v for v in (noted, *logged) if v is not None and not math.isnan(v)]
        self._best_ema = max(values, default=None)
        is_best = self._best_ema != noted and logged[-1] == self._best_ema
        self._best_so_far = Path(source) if is_best and isinstance(source, str) else None


def _failure(path: Path, error: Exception) -> str:
    """What a checkpoint that can't be written means for the user."""
    kept = f"The previous {path.name} is unchanged" if path.is_file() else f"There is no {path.name} yet"
    free = shutil.disk_usage(path.parent).free // 2**20
    return (
        f"can't write {path} ({' '.join(str(error).split())}; {free} MB are free, and a checkpoint needs its size "
        f"once more beside the one that it replaces). {kept}: make room, then continue with --c."
    )
