"""A checkpoint is continued only where it is whole, finite and this training's own; the error says what helps."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_ext.errors import UsageError
from nnunet_ext.trainers.continuing import check_continuable, check_places, latest_of


class Trainer:
    """What is asked of nnU-Net's trainer."""

    def __init__(self, folder: Path, fold: int = 0, channels: int = 3) -> None:
        self.output_folder = str(folder)
        self.network = nn.Conv2d(2, channels, 3)
        plans: dict[str, Any] = {"plans_name": "nnUNetPlans", "dataset_name": "Dataset004_x"}
        plans["configurations"] = {"2d": {"patch_size": [8, 8], "batch_size": 2}}
        dataset = {"labels": {"background": 0, "a": 1, "b": 2}}
        self.my_init_kwargs = {"plans": plans, "configuration": "2d", "fold": fold, "dataset_json": dataset}
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.1, momentum=0.9)
        self.network(torch.zeros(1, 2, 3, 3)).sum().backward()
        self.optimizer.step()
        self.said: list[str] = []

    def print_to_log_file(self, text: str) -> None:
        self.said.append(text)

    def content(self) -> dict[str, Any]:
        return {
            "network_weights": self.network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "logging": {"ema_fg_dice": [0.5] * 7},
            "init_args": self.my_init_kwargs,
            "current_epoch": 7,
            "_best_ema": None,
            "trainer_name": type(self).__name__,
        }


class OtherTrainer(Trainer):
    """Of the same network."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint_latest.pth"
    torch.save(Trainer(tmp_path).content(), path)
    return path


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path)
    change(content)
    torch.save(content, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    weights = torch.load(path)["network_weights"]["bias"].numpy().tobytes()
    content[content.index(weights)] ^= 1
    path.write_bytes(content)
    torch.load(path)  # PyTorch minds nothing


def lose(path: Path) -> None:
    changed(path, lambda content: content["network_weights"]["bias"].fill_(float("inf")))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off or damaged": cut,
    "not a zip file": lambda path: path.write_bytes(b""),
    "is damaged": flip,
    "it is no file": lambda path: (path.unlink(), path.mkdir()),
    "File is not": lambda path: path.write_bytes(pickle.dumps([1])),
    "it lacks network_weights, optimizer_state": lambda path: torch.save([1], path),
    "it lacks logging": lambda path: changed(path, lambda content: content.pop("logging")),
    r"\(fold 1, not 0\)": lambda path: torch.save(Trainer(path.parent, fold=1).content(), path),
    "plans_name otherPlans, not": lambda path: changed(
        path, lambda content: content["init_args"]["plans"].update(plans_name="otherPlans")
    ),
    "does not fit the network of Trainer.*has 2 other weights": lambda path: torch.save(
        Trainer(path.parent, channels=4).content(), path
    ),
    r"no numbers \(NaN or infinite, in bias\).*diverged before epoch 7": lose,
    r"has 1 other weights \(1\)": lambda path: changed(
        path, lambda content: content["network_weights"].update({1: torch.zeros(1)})
    ),
    r"has 1 other weights \(bias\)": lambda path: changed(
        path, lambda content: content["network_weights"].update(bias=torch.zeros(3, dtype=torch.int8))
    ),
    r"\(label a 2, not 1; label b 1, not 2\)": lambda path: changed(
        path, lambda content: content["init_args"]["dataset_json"]["labels"].update(a=2, b=1)
    ),
    "ema_fg_dice and a number for _best_ema, it has None and None": lambda path: changed(
        path, lambda content: content["logging"].clear()
    ),
    "it has 3 and None": lambda path: changed(path, lambda content: content["logging"].update(ema_fg_dice=3)),
    "and '': move": lambda path: changed(path, lambda content: content.update(_best_ema="")),
    "and 'x': move": lambda path: changed(path, lambda content: content.update(_best_ema="x")),
    r"optimiser of Trainer with these plans: .* of \[2\] weights in its groups, it has that of none": lambda path: (
        changed(path, lambda content: content["optimizer_state"].clear())
    ),
    r"it has that of \[1\], 0 of other shapes": lambda path: changed(
        path, lambda content: content["optimizer_state"]["param_groups"][0]["params"].pop()
    ),
    r"it has that of \[2\], 1 of other shapes": lambda path: changed(
        path, lambda content: content["optimizer_state"]["state"][0].update(momentum_buffer=torch.zeros(3))
    ),
    r"memory that is no numbers \(NaN or infinite, in 1 of 2 tensors\)": lambda path: changed(
        path, lambda content: content["optimizer_state"]["state"][0]["momentum_buffer"].view(-1)[0].fill_(float("nan"))
    ),
}


@pytest.mark.parametrize("best", [True, False])
@pytest.mark.parametrize("words", DAMAGES)
def test_what_is_damaged_or_not_its_own_is_refused_and_the_cure_says_what_follows(
    words: str, best: bool, path: Path
) -> None:
    if best:
        torch.save(Trainer(path.parent).content(), path.with_name("checkpoint_best.pth"))
    DAMAGES[words](path)
    with pytest.raises(UsageError, match=words) as caught:
        check_continuable(path, Trainer(path.parent))
    then = "continues from checkpoint_best.pth" if best else "starts a new training"
    assert str(path) in str(caught.value)
    assert f"move it away, nnUNetv2_train --c then {then}" in str(caught.value)


def test_its_own_checkpoint_is_taken_without_a_word(path: Path) -> None:
    trainer = Trainer(path.parent)
    check_continuable(path, trainer)
    assert trainer.said == []


def test_weights_of_a_trainer_with_the_same_network_are_taken_and_the_log_says_so(path: Path) -> None:
    trainer = OtherTrainer(path.parent)
    check_continuable(path, trainer)
    assert trainer.said == [f"{path} was written by Trainer: its training goes on as OtherTrainer."]


def test_a_checkpoint_from_elsewhere_may_be_of_another_fold_but_not_damaged(path: Path, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "fold_1", fold=1)
    check_continuable(path, trainer)
    lose(path)
    with pytest.raises(UsageError, match=r"diverged.*: take another one\.$"):
        check_continuable(path, trainer)


@pytest.mark.parametrize(("epoch", "taken"), [(6, "latest"), (7, "latest"), (8, "best")])
def test_a_best_checkpoint_newer_than_the_latest_is_continued(epoch: int, taken: str, path: Path) -> None:
    best, trainer = path.with_name("checkpoint_best.pth"), Trainer(path.parent)
    assert latest_of(path, trainer) == path
    torch.save({**trainer.content(), "current_epoch": epoch}, best)
    trainer.said.clear()
    assert latest_of(path, trainer) == path.with_name(f"checkpoint_{taken}.pth")
    assert trainer.said == [f"{best} is of epoch 8, {path.name} of 7: the training goes on from it."] * (epoch > 7)
    assert latest_of(path, Trainer(path.parent / "fold_1")) == path
    final = path.rename(path.with_name("checkpoint_final.pth"))
    assert latest_of(final, trainer) == final  # `--val` looks at what it is told


@pytest.mark.parametrize("name", ["checkpoint_latest.pth", "checkpoint_best.pth"])
def test_without_two_whole_checkpoints_there_is_no_choice(name: str, path: Path) -> None:
    torch.save({**Trainer(path.parent).content(), "current_epoch": 8}, path.with_name("checkpoint_best.pth"))
    cut(path.with_name(name))
    trainer = Trainer(path.parent)
    assert latest_of(path, trainer) == path
    assert re.fullmatch(rf"The training goes on from {path.name}: .*{name} .*: it is not looked at\.", trainer.said[0])


def test_settings_that_have_changed_are_told(path: Path) -> None:
    trainer = Trainer(path.parent)
    trainer.my_init_kwargs["plans"]["configurations"]["2d"]["patch_size"] = [8, 16]
    check_continuable(path, trainer)
    assert trainer.said == [f"Plans have changed since {path} was written: patch_size [8, 8], now [8, 16]."]


@pytest.mark.parametrize("name", ["checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"])
def test_a_folder_or_lost_link_by_the_name_of_a_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    check_places(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=rf"{name} must be a file, it is a folder: move it away"):
        check_places(tmp_path)
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match=rf"{name} is missing: move it away"):
        check_places(tmp_path)


def test_what_nnunet_can_continue_is_not_refused(tmp_path: Path) -> None:
    trainer, path = Trainer(tmp_path), tmp_path / "checkpoint_latest.pth"
    content = trainer.content()
    content["current_epoch"] = np.int64(7)
    content["logging"]["ema_fg_dice"][0] = np.float32(0.5)
    content["network_weights"]["_extra_state"] = {"of": "an older version"}
    plans = {**content["init_args"]["plans"], "dataset_name": "Dataset004_old"}
    content["init_args"] = {**content["init_args"], "plans": plans}
    torch.save(content, path, _use_new_zipfile_serialization=False)  # as PyTorch before 1.6
    check_continuable(path, trainer)
    assert any("was trained on Dataset004_old" in line for line in trainer.said)
