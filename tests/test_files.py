"""Files and folders are whole or not there; one run at a time in a folder."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_ext.errors import UsageError
from nnunet_ext.files import locked, whole_folder, write_text, writing


def test_failed_write_keeps_the_old_file_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "note.json"
    write_text(path, "old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        UsageError, match=r"can't write .*note\.json: No space left on device.*another output folder"
    ):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["note.json"]


def test_folder_takes_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "data"
    with whole_folder(target) as folder:
        (folder / "a").write_text("a")
        assert not target.exists()
    assert (target / "a").read_text() == "a"
    assert os.listdir(tmp_path) == ["data"]
    assert stat.S_IMODE(target.stat().st_mode) & 0o755 == 0o755


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_folder_that_failed_is_removed(tmp_path: Path, error: BaseException) -> None:
    def fill() -> None:
        with whole_folder(tmp_path / "data") as folder:
            (folder / "a").write_text("a")
            raise error

    with pytest.raises(UsageError if isinstance(error, OSError) else KeyboardInterrupt):
        fill()
    assert os.listdir(tmp_path) == []


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), writing(tmp_path):
        raise ValueError("mine")


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks")
def test_second_demo_in_a_folder_is_refused(tmp_path: Path) -> None:
    def lock_again() -> None:
        with locked(tmp_path / "demo.lock"):
            pytest.fail("locked twice")

    with locked(tmp_path / "demo.lock"), pytest.raises(UsageError, match="another run is at work"):
        lock_again()
    with locked(tmp_path / "demo.lock") as descriptor:
        assert descriptor is not None


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks")
def test_child_that_outlives_the_demo_keeps_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "demo.lock") as descriptor:
        assert descriptor is not None
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(descriptor,)
        )
    with pytest.raises(UsageError, match="another run is at work"), locked(tmp_path / "demo.lock"):
        pass
    child.communicate(b"\n")
    with locked(tmp_path / "demo.lock") as descriptor:
        assert descriptor is not None
