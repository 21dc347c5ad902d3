"""One training at a time writes to a fold's folder; a killed one holds nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_ext.errors import UsageError
from nnunet_ext.trainers import fold_lock
from nnunet_ext.trainers.fold_lock import LOCK, only_training

# Holds the folder; its forked child, like a data loader of nnU-Net, outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from nnunet_ext.trainers.fold_lock import only_training
with only_training(Path(sys.argv[1])):
    child = os.fork() if hasattr(os, "fork") else 0
    if child or not hasattr(os, "fork"):
        print(child, flush=True)
    time.sleep(100)
"""


def start_holder(folder: Path) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as output:
        return process, int(output.readline())


def test_second_process_is_refused_and_told_who_trains(tmp_path: Path) -> None:
    process, child = start_holder(tmp_path)
    try:
        with (
            pytest.raises(
                UsageError, match=rf"one training at a time.*process {process.pid} on .*trains there"
            ) as caught,
            only_training(tmp_path),
        ):
            pytest.fail("two hold the folder")
        assert "\n" not in str(caught.value)
    finally:
        process.kill()
        process.wait()
        if child:
            os.kill(child, signal.SIGTERM)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_killed_process_frees_the_folder_though_its_data_loader_lives(tmp_path: Path) -> None:
    process, child = start_holder(tmp_path)
    try:
        process.kill()
        process.wait()
        os.kill(child, 0)  # it lives
        with only_training(tmp_path) as has_locks:
            assert has_locks
    finally:
        os.kill(child, signal.SIGTERM)


def test_same_process_is_refused_too_and_the_first_keeps_the_folder(tmp_path: Path) -> None:
    with only_training(tmp_path):
        for _ in range(2):
            with pytest.raises(UsageError, match=f"process {os.getpid()} on "), only_training(tmp_path):
                pytest.fail("held twice")
        code = "import sys; from pathlib import Path; from nnunet_ext.trainers.fold_lock import only_training\n"
        code += f"with only_training(Path({str(tmp_path)!r})): pass"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "one training at a time" in other.stderr


def test_folder_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), only_training(tmp_path):
        raise ValueError("mine")
    with only_training(tmp_path) as has_locks:
        assert has_locks
    assert os.listdir(tmp_path) == [LOCK]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_file_system_without_locks_is_told_and_used(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fold_lock, "_lock", no_locks)
    with only_training(tmp_path) as has_locks:
        assert not has_locks


def test_folder_that_cant_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"can't write .*training\.lock"), only_training(tmp_path / "file"):
        pass
