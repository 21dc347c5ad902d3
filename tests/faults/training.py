"""nnU-Net's training command as it runs in a child: repeatable, and telling what it does."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.multiprocessing as mp
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
from nnunetv2.run import run_training as nnunet

from nnunet_ext.registry import parse_schedule
from tests.contract.conftest import WORKSPACE
from tests.contract.threads import threads_for_processes
from tests.contract.two_ranks import on_cpu
from tests.faults.triggers import Trigger

_CURVES = "nnunetv2.training.logging.nnunet_logger.MetaLogger.plot_progress_png"
HOST = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training of a fold, and what is done to it.

    Args:
        results: nnU-Net's folder of results.
        dataset: Number of the data set.
        trainer: Name of the trainer, with its schedule.
        fold: Fold.
        ranks: Processes that train together.
        workers: Augmentation processes of each.
        arguments: More of nnU-Net's command.
        trigger: What happens in which rank.
        rank: Rank in which it happens.
        validates: Whether the validation after the training is done.
        changes: More that is patched in each process.
        told_in: Folder of what it tells; None: beside `results`.
    """

    results: Path
    dataset: int
    trainer: str
    fold: int = 0
    ranks: int = 1
    workers: int = 0
    arguments: tuple[str, ...] = ("--c",)
    trigger: Trigger = field(default_factory=Trigger)
    rank: int = 0
    validates: bool = False
    changes: tuple[Callable[[], Any], ...] = ()
    told_in: Path | None = None

    @property
    def model(self) -> Path:
        """Folder of the trained model."""
        (data,) = (WORKSPACE / "preprocessed").glob(f"Dataset{self.dataset:03d}_*")
        return self.results / data.name / f"{self.trainer}__nnUNetPlans__3d_fullres"

    @property
    def epochs(self) -> int:
        """Epochs that the trainer's name asks for."""
        schedule = parse_schedule(self.trainer)
        return (schedule and schedule.epochs) or 0

    @property
    def folder(self) -> Path:
        """Folder of the fold."""
        return self.model / f"fold_{self.fold}"

    @property
    def notes(self) -> Path:
        """What the training has told, a line of JSON each; outside of the folder that it writes to."""
        return (self.told_in or self.results.parent) / f"{self.results.name}-{self.trainer}-{self.fold}.notes"

    def __call__(self) -> None:
        """Do what `nnUNetv2_train` does."""
        os.environ.update(nnUNet_results=str(self.results), nnUNet_n_proc_DA=str(self.workers))
        options = ["-tr", self.trainer, "-device", "cpu" if self.ranks == 1 else "cuda", *self.arguments]
        options += ["-num_gpus", str(self.ranks)] if self.ranks > 1 else []
        sys.argv = ["nnUNetv2_train", str(self.dataset), "3d_fullres", str(self.fold), *options]
        with ExitStack() as stack:
            for name in ("set_num_threads", "set_num_interop_threads"):  # results depend on their number
                stack.enter_context(patch.object(torch, name, lambda n: None))
            if self.ranks > 1:
                stack.enter_context(patch.object(nnunet, "mp", SimpleNamespace(spawn=self._fork_ranks)))
            else:
                stack.enter_context(self._changed(0))
            nnunet.run_training_entry()

    def predict(self, output: Path) -> None:
        """Do what `nnUNetv2_predict` does, with the images of training."""
        os.environ.update(nnUNet_results=str(self.results))
        (data,) = (WORKSPACE / "raw").glob(f"Dataset{self.dataset:03d}_*")
        options = ["-d", str(self.dataset), "-c", "3d_fullres", "-f", str(self.fold), "-tr", self.trainer]
        options += ["-device", "cpu", "-npp", "0", "-nps", "0", "--disable_tta"]
        sys.argv = ["nnUNetv2_predict", "-i", str(data / "imagesTr"), "-o", str(output), *options]
        predict_entry_point()

    def _fork_ranks(self, run_ddp: Callable[..., None], args: tuple[Any, ...], nprocs: int, join: bool) -> None:
        """Take the place of `torch.multiprocessing.spawn`, whose processes import all again."""
        mp.start_processes(self._run_rank, args, nprocs, join, start_method="fork")

    def _run_rank(self, rank: int, *arguments: Any) -> None:
        with ExitStack() as stack:
            for change in on_cpu():
                stack.enter_context(change)
            stack.enter_context(self._changed(rank))
            nnunet.run_ddp(rank, *arguments)

    @contextmanager
    def _changed(self, rank: int) -> Iterator[None]:
        make = nnunet.get_trainer_from_args

        def get_trainer_from_args(*arguments: Any, **options: Any) -> Any:
            seed(0, rank)
            trainer = make(*arguments, **options)
            if self.ranks > 1:
                trainer.device = torch.device("cpu")
            self._listen(trainer, rank)
            return trainer

        with threads_for_processes(), patch(_CURVES), ExitStack() as stack:
            stack.enter_context(patch.object(nnunet, "get_trainer_from_args", get_trainer_from_args))
            if not self.validates:
                stack.enter_context(patch(f"{HOST}.nnUNetTrainer.perform_actual_validation"))
            for change in self.changes:
                stack.enter_context(change())
            yield

    def _listen(self, trainer: Any, rank: int) -> None:
        """Save after each epoch, repeat the same epochs in the same way, tell what is saved, and fail when told."""
        trainer.save_every = 1
        begin, save, end = trainer.on_epoch_start, trainer.save_checkpoint, trainer.on_train_end
        trigger = self.trigger if rank == self.rank else Trigger()

        def on_epoch_start() -> None:
            seed(trainer.current_epoch, rank)
            self._note(rank, process=os.getpid(), begins=trainer.current_epoch)
            trigger.epoch(trainer)
            begin()

        def save_checkpoint(filename: str) -> None:
            if rank == 0:
                state = state_of(trainer)
                self._note(rank, saves=Path(filename).name, epoch=trainer.current_epoch + 1, digest=state)
            with trigger.saving():
                save(filename)
            if rank == 0:
                self._note(rank, saved=Path(filename).name, epoch=trainer.current_epoch + 1, ticks=trigger.ticks)

        def on_train_end() -> None:
            with trigger.ending():
                end()
            self._note(rank, ended=trainer.current_epoch)

        trainer.on_epoch_start, trainer.save_checkpoint = on_epoch_start, save_checkpoint
        trainer.on_train_end = on_train_end
        trigger.begin()

    def _note(self, rank: int, **facts: Any) -> None:
        line = json.dumps({"rank": rank, **facts}) + "\n"
        descriptor = os.open(self.notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())  # in one piece, and kept by the system when the process is killed
        finally:
            os.close(descriptor)

    def told(self) -> list[dict[str, Any]]:
        """All notes, of all runs of the fold."""
        text = self.notes.read_text() if self.notes.exists() else ""
        return [json.loads(line) for line in text.splitlines()]


def seed(epoch: int, rank: int) -> None:
    """Make what an epoch draws its own, whether earlier ones were done in this process or not."""
    value = 1000 * epoch + rank
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def state_of(trainer: Any) -> str:
    """Digest of what a checkpoint of this moment must hold."""
    network = trainer.network.module if trainer.is_ddp else trainer.network
    return digest(network.state_dict(), trainer.optimizer.state_dict())


def digest(weights: Any, optimizer: Any) -> str:
    """Checksum of all weights, buffers and moments, bit by bit."""
    total = hashlib.sha256()
    tensors = list(weights.values())
    for _, moments in sorted(optimizer["state"].items()):
        tensors += [value for _, value in sorted(moments.items()) if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
