from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nnunet_ext.nnunet.progress import read_progress

LINE = "2026-11-28 09:42:19.667816: "


def epoch(number: int, seconds: float = 130.35, loss: str = "-0.6056", ended: bool = True) -> str:
    lines = ["", f"Epoch {number}", "Current learning rate: 0.00536"]
    lines += [f"train_loss {loss}", "val_loss -0.6894", f"Epoch time: {seconds} s"] if ended else []
    return "".join(f"{LINE}{line} \n" for line in lines)


def write(fold: Path, name: str, text: str, epochs: int | None = 8) -> None:
    path = fold / f"training_log_{name}.txt"
    path.write_text(text)
    os.utime(path, (ord(name), ord(name)))  # nnU-Net's names don't sort
    if epochs is not None:
        (fold / "debug.json").write_text(json.dumps({"num_epochs": str(epochs)}))


def test_a_training_that_runs_tells_epochs_and_the_time_left(tmp_path: Path) -> None:
    write(tmp_path, "a", epoch(3) + epoch(4, 140.0) + epoch(5, 120.0) + epoch(6, ended=False))
    found = read_progress(tmp_path)
    assert found is not None
    assert (found.epoch, found.epochs, found.seconds) == (6, 8, 130.35)
    assert found.seconds_left == 2 * 130.35
    assert not found.is_validating


def test_before_anything_is_logged_nothing_is_known(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None
    write(tmp_path, "a", "", epochs=None)
    found = read_progress(tmp_path)
    assert found is not None
    assert (found.epoch, found.epochs, found.seconds_left, found.is_diverged) == (0, None, None, False)


def test_a_continued_training_begins_where_the_earlier_log_ends(tmp_path: Path) -> None:
    write(tmp_path, "a", epoch(0) + epoch(1))
    write(tmp_path, "b", f"{LINE}This is the configuration \n")
    found = read_progress(tmp_path)
    assert found is not None
    assert found.epoch == 2


def test_validation_is_told(tmp_path: Path) -> None:
    write(tmp_path, "a", epoch(7) + f"{LINE}Training done. \n{LINE}predicting case \n")
    found = read_progress(tmp_path)
    assert found is not None
    assert found.is_validating
    assert found.epoch == 8


def test_validations_do_not_hide_that_a_training_diverged(tmp_path: Path) -> None:
    write(tmp_path, "a", "".join(epoch(number, loss="nan") for number in range(5)) + f"{LINE}Training done. \n")
    for name in "bcdef":
        write(tmp_path, name, f"{LINE}predicting case \n")
    found = read_progress(tmp_path)
    assert found is not None
    assert found.is_diverged


@pytest.mark.parametrize("content", ['{"num_epochs": null}', '{"num_epochs": []}', "{}", "{"])
def test_what_nnunet_has_not_noted_is_not_known(content: str, tmp_path: Path) -> None:
    write(tmp_path, "a", epoch(0))
    (tmp_path / "debug.json").write_text(content)
    found = read_progress(tmp_path)
    assert found is not None
    assert found.epochs is None


@pytest.mark.parametrize(
    ("losses", "done", "diverged"),
    [
        (["nan"] * 5, False, True),
        (["inf"] * 5, False, True),
        (["-0.5", *["nan"] * 4], False, False),
        (["nan"] * 2, False, False),
        (["nan"] * 2, True, True),
        (["nan", "-0.5"], True, False),
    ],
)
def test_a_loss_that_is_lost_is_told_from_one_bad_epoch(
    losses: list[str], done: bool, diverged: bool, tmp_path: Path
) -> None:
    text = "".join(epoch(number, loss=loss) for number, loss in enumerate(losses))
    write(tmp_path, "a", text + f"{LINE}Training done. \n" * done)
    found = read_progress(tmp_path)
    assert found is not None
    assert found.is_diverged == diverged
