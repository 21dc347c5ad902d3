"""Checkpoints stay whole and of one training: first rank only, own names, the best result kept in mind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nnunet_ext.errors import UsageError
from nnunet_ext.files import partial
from nnunet_ext.nnunet.checkpoints import SAVE_REQUEST
from nnunet_ext.trainers import checkpointing
from nnunet_ext.trainers.checkpointing import AtomicCheckpointMixin
from nnunet_ext.trainers.fold_lock import only_training
from tests.conftest import KilledPartial


class Logger:
    """As nnU-Net's: what it gives to the checkpoint is all that it knows."""

    def __init__(self, ema: list[float]) -> None:
        self.content = {"ema_fg_dice": ema}

    def get_checkpoint(self) -> dict[str, list[float]]:
        return self.content


class Host:
    """What the mixin needs of nnU-Net's trainer."""

    disable_checkpointing = is_ddp = False
    was_initialized = True
    save_every, current_epoch = 50, 3
    _best_ema: float | None = None

    def __init__(self, folder: Path, rank: int = 0, global_rank: int | None = None) -> None:
        self.output_folder = str(folder)
        self.local_rank = rank  # on its machine, where nnU-Net counts all of them as well
        if global_rank is not None:
            self.global_rank = global_rank
        self.said: list[str] = []
        self.content = b"whole"
        self.logger = Logger([])

    def print_to_log_file(self, *text: str, also_print_to_console: bool = True) -> None:
        self.said += text

    def save_checkpoint(self, filename: str) -> None:
        if getattr(self, "global_rank", self.local_rank) == 0 and not self.disable_checkpointing:
            Path(filename).write_bytes(self.content)

    def load_checkpoint(self, content: dict[str, Any]) -> None:
        self._best_ema = content["_best_ema"]
        self.logger = Logger(content["ema"])

    def run_training(self) -> None:
        self.save_checkpoint(os.path.join(self.output_folder, "checkpoint_latest.pth"))

    def on_epoch_end(self) -> None:
        if (self.current_epoch + 1) % self.save_every == 0:
            self.save_checkpoint(os.path.join(self.output_folder, "checkpoint_latest.pth"))
        self.current_epoch += 1


class Trainer(AtomicCheckpointMixin, Host):
    """As our trainers are made."""


@pytest.mark.parametrize("ranks", [{"rank": 1}, {"rank": 7}, {"rank": 0, "global_rank": 4}])
def test_other_ranks_touch_no_file(ranks: dict[str, int], tmp_path: Path) -> None:
    good, half = tmp_path / "checkpoint_latest.pth", tmp_path / "checkpoint_latest.pth.partial"
    good.write_bytes(b"good")
    half.write_bytes(b"ha")
    own = partial(good)  # of the first rank, which writes just now
    own.write_bytes(b"ha")
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in tmp_path.iterdir()}
    trainer = Trainer(tmp_path, **ranks)
    trainer.save_checkpoint(str(good))
    trainer.run_training()
    assert {path: (path.read_bytes(), path.stat().st_ino) for path in tmp_path.iterdir()} == before


def test_a_file_in_the_folder_asks_for_a_checkpoint_where_the_epoch_ends(tmp_path: Path) -> None:
    first, second = Trainer(tmp_path), Trainer(tmp_path, rank=1)
    latest, request = tmp_path / "checkpoint_latest.pth", tmp_path / SAVE_REQUEST
    first.on_epoch_end()
    assert not latest.exists()
    request.touch()
    second.on_epoch_end()
    assert request.exists()
    first.on_epoch_end()
    assert latest.read_bytes() == b"whole"
    assert not request.exists()
    assert first.save_every == 50
    latest.unlink()
    first.on_epoch_end()
    assert not latest.exists()


def test_what_an_earlier_training_was_asked_for_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / SAVE_REQUEST).touch()
    Trainer(tmp_path).run_training()
    assert not (tmp_path / SAVE_REQUEST).exists()


def test_other_ranks_train_while_the_first_holds_the_folder(tmp_path: Path) -> None:
    with only_training(tmp_path):
        Trainer(tmp_path, rank=1).run_training()


def test_second_training_is_refused_before_it_writes(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    with only_training(tmp_path), pytest.raises(UsageError, match="one training at a time"):
        trainer.run_training()
    assert not (tmp_path / "checkpoint_latest.pth").exists()
    trainer.run_training()
    assert (tmp_path / "checkpoint_latest.pth").read_bytes() == b"whole"


def test_checkpoint_that_is_written_carries_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    save = Host.save_checkpoint

    def note(self: Host, filename: str) -> None:
        written.append(Path(filename))
        save(self, filename)

    monkeypatch.setattr(Host, "save_checkpoint", note)
    for _ in range(2):
        Trainer(tmp_path).save_checkpoint(str(tmp_path / "checkpoint_best.pth"))
    assert len({*written}) == 2  # no two writers share a file
    assert all(f"-{os.getpid()}-" in path.parent.name for path in written)
    # torch.save stores the last name in the file, which is passed on to others
    assert {path.name for path in written} == {"checkpoint_best.pth"}
    assert os.listdir(tmp_path) == ["checkpoint_best.pth"]


def test_training_removes_what_killed_ones_left_and_nothing_else(tmp_path: Path, killed_partial: KilledPartial) -> None:
    killed_partial(tmp_path).write_bytes(b"ha")
    elsewhere = tmp_path / ".partial-nnunet_ext-lostnode-4026531836-77-1-0123abcd"  # nobody else trains here now
    elsewhere.write_bytes(b"ha")
    foreign = tmp_path / ".partial-of-rsync"
    foreign.write_bytes(b"ha")
    Trainer(tmp_path).run_training()
    assert sorted(os.listdir(tmp_path)) == [foreign.name, "checkpoint_latest.pth", "training.lock"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("iostream error")])
def test_full_disk_keeps_the_previous_checkpoint_and_the_log_says_so(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    trainer = Trainer(tmp_path)
    trainer.save_checkpoint(str(path))

    def full_disk(self: Host, filename: str) -> None:
        Path(filename).write_bytes(b"ha")
        raise error

    monkeypatch.setattr(Host, "save_checkpoint", full_disk)
    with pytest.raises(OSError, match="can't write") as caught:
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == [path.name]
    assert trainer.said[-1] == str(caught.value)
    assert f"The previous {path.name} is unchanged" in trainer.said[-1]
    assert "--c" in trainer.said[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_kill_while_a_checkpoint_is_written_keeps_the_previous_one(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    path.write_bytes(b"good")
    code = f"""
import os, signal, sys
from pathlib import Path
from tests.trainers.test_checkpointing import Host, Trainer
def half(self, filename):
    Path(filename).write_bytes(b"ha")
    os.kill(os.getpid(), signal.SIGKILL)
Host.save_checkpoint = half
Trainer(Path({str(tmp_path)!r})).run_training()
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"good"
    Trainer(tmp_path).run_training()
    assert path.read_bytes() == b"whole"
    assert sorted(os.listdir(tmp_path)) == [path.name, "training.lock"]


@pytest.mark.parametrize(
    ("stored", "logged", "best"),
    [
        (0.5, [0.4, 0.5, 0.7], 0.7),  # the last epoch was the best; its file was written before that was noted
        (0.7, [0.4, 0.7, 0.6], 0.7),
        (None, [0.3], 0.3),
        (None, [], None),
        (0.5, [0.4, float("nan")], 0.5),
        (float("nan"), [0.4], 0.4),
    ],
)
def test_best_result_counts_the_epoch_after_which_the_checkpoint_was_written(
    stored: float | None, logged: list[float], best: float | None, tmp_path: Path
) -> None:
    trainer = Trainer(tmp_path)
    trainer.load_checkpoint({"_best_ema": stored, "ema": logged})
    assert trainer._best_ema == best


@pytest.mark.parametrize(
    ("noted", "logged", "kept"), [(0.5, [0.5, 0.7], b"latest"), (0.7, [0.7, 0.6], b"best"), (0.5, [0.7, 0.6], b"best")]
)
def test_best_checkpoint_that_a_kill_prevented_is_made_from_the_latest(
    noted: float, logged: list[float], kept: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Host, filename: str) -> None:
        self._best_ema, self.logger = noted, Logger(logged)

    monkeypatch.setattr(Host, "load_checkpoint", load)
    monkeypatch.setattr(checkpointing, "check_continuable", lambda path, trainer: None)
    latest, best = tmp_path / "checkpoint_latest.pth", tmp_path / "checkpoint_best.pth"
    latest.write_bytes(b"latest")
    best.write_bytes(b"best")
    trainer = Trainer(tmp_path)
    trainer.load_checkpoint(str(latest))
    assert best.read_bytes() == b"best"  # `--val` writes nothing
    trainer.run_training()
    assert best.read_bytes() == kept


def test_a_training_is_continued_from_what_was_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(self: Host, filename: str) -> None:
        loaded.append(filename)
        self._best_ema, self.logger = 0.5, Logger([0.5])

    monkeypatch.setattr(Host, "load_checkpoint", load)
    monkeypatch.setattr(checkpointing, "check_continuable", lambda path, trainer: loaded.append(str(path)))
    monkeypatch.setattr(checkpointing, "latest_of", lambda path, trainer: path.with_name("checkpoint_best.pth"))
    Trainer(tmp_path).load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    latest, best = (str(tmp_path / f"checkpoint_{name}.pth") for name in ("latest", "best"))
    assert loaded == [latest, best, best]  # both are looked at, one is loaded
