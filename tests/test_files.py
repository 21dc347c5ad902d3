"""Files and folders are whole or not there; one run at a time in a folder."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import filelock
import psutil
import pytest

from nnunet_ext import files
from nnunet_ext.errors import UsageError
from nnunet_ext.files import (
    check_folder,
    locked,
    partial,
    remove_partials,
    whole_file,
    whole_folder,
    write_files,
    write_text,
    writing,
)
from tests.conftest import KilledPartial, RunPython


def test_failed_write_keeps_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note.json"
    write_text(path, "old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UsageError, match=r"can't write .*note\.json: No space left on device.*another output folder"):
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


def test_work_of_living_processes_and_of_other_programs_stays(tmp_path: Path, killed_partial: KilledPartial) -> None:
    living = partial(tmp_path / "shipped")  # of a parallel call of this very process
    elsewhere = tmp_path / partial(tmp_path / "x").name.replace(files._machine(), "other-node-4026531836")
    foreign = [tmp_path / name for name in (".partial-rsync", ".partial-nnunet_ext-notes", "data.partial-1")]
    for folder in (living, elsewhere, *foreign):
        folder.mkdir()
    dead = killed_partial(tmp_path)
    dead.mkdir()
    with whole_folder(tmp_path / "data"):
        assert not dead.exists()
    write_text(tmp_path / "note.json", "{}")
    assert all(folder.is_dir() for folder in (living, elsewhere, *foreign))


def test_killed_process_that_nobody_reaped_counts_as_dead(tmp_path: Path) -> None:
    code = f"from nnunet_ext.files import partial, Path; partial(Path({str(tmp_path)!r}) / 'x').mkdir()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read()  # until it ends; it is a zombie until `wait`
        while not files_in(tmp_path) or psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        remove_partials(tmp_path)
    assert files_in(tmp_path) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_a_dead_process_whose_number_another_one_got_counts_as_dead(tmp_path: Path) -> None:
    living = partial(tmp_path / "x")
    start = files._start(os.getpid())
    dead = tmp_path / living.name.replace(f"-{os.getpid()}-{start}-", f"-{os.getpid()}-{start - 1}-")
    for folder in (living, dead):
        folder.mkdir()
    remove_partials(tmp_path)
    assert files_in(tmp_path) == [living.name]


def test_two_calls_at_once_do_not_hit_each_other(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "one") as one, whole_folder(tmp_path / "two") as two:
        (one / "a").write_text("1")
        (two / "a").write_text("2")
    assert (tmp_path / "one" / "a").read_text() + (tmp_path / "two" / "a").read_text() == "12"


def test_folder_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def write() -> None:
        with whole_folder(tmp_path / "data") as folder:
            (folder / "a").write_text("mine")
            (tmp_path / "data").mkdir()
            (tmp_path / "data" / "a").write_text("theirs")

    with pytest.raises(UsageError, match=r"can't write .*data: File exists"):
        write()
    assert (tmp_path / "data" / "a").read_text() == "theirs"
    assert files_in(tmp_path) == ["data", "data/a"]


@pytest.mark.parametrize("fails", [False, True])
def test_earlier_folder_gives_way_only_to_a_whole_one(tmp_path: Path, fails: bool) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "old").write_text("")

    def write() -> None:
        with whole_folder(tmp_path / "data", replace=True) as folder:
            (folder / "new").write_text("")
            assert (tmp_path / "data" / "old").exists()
            if fails:
                raise OSError(28, "No space left on device")

    if fails:
        with pytest.raises(UsageError, match="No space left"):
            write()
    else:
        write()
    assert files_in(tmp_path) == ["data", "data/old" if fails else "data/new"]


def test_files_that_belong_together_are_replaced_together(tmp_path: Path) -> None:
    write_files(tmp_path, {"a": b"1", "sub/b": b"1", "sub/c": b"1"})
    write_files(tmp_path, {"a": b"2", "sub/b": b"2"}, gone=["sub/c"])
    assert contents(tmp_path) == {"a": b"2", "sub/b": b"2"}


@pytest.mark.parametrize("number", range(1, 7))
def test_error_at_any_step_brings_the_earlier_files_back(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, {"a": b"1", "sub/b": b"1", "sub/c": b"1"})
    rename, calls = os.rename, []

    def fail(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UsageError, match="No space left"):
        write_files(tmp_path, {"a": b"2", "sub/b": b"2", "sub/new": b"2"}, gone=["sub/c"])
    assert contents(tmp_path) == {"a": b"1", "sub/b": b"1", "sub/c": b"1"}


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("number", range(1, 6))
def test_kill_at_any_step_leaves_no_mixture_and_the_next_call_cleans_up(number: int, tmp_path: Path) -> None:
    write_files(tmp_path, {"a": b"1", "sub/b": b"1", "sub/c": b"1"})
    code = f"""
import os, signal
from pathlib import Path
from nnunet_ext.files import write_files
calls, rename = [], os.rename
def kill(source, target):
    calls.append(source)
    if len(calls) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = kill
write_files(Path({str(tmp_path)!r}), {{"a": b"2", "sub/b": b"2"}}, gone=["sub/c"])
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert len({content for name, content in contents(tmp_path).items() if ".partial" not in name}) <= 1
    write_files(tmp_path, {"a": b"3", "sub/b": b"3"}, gone=["sub/c"])
    assert contents(tmp_path) == {"a": b"3", "sub/b": b"3"}


def test_folder_in_the_place_of_a_file_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "a" / "mine").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"can't write .*: Is a directory"):
        write_files(tmp_path, {"a": b"2"})
    assert files_in(tmp_path) == ["a", "a/mine"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
@pytest.mark.parametrize("call", ["write_text(path, 'x' * 10**5)", "write_files(path.parent, {'note': b'x' * 10**5})"])
def test_disk_that_takes_no_more_keeps_the_old_file(call: str, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("old")
    code = f"""
import resource
from nnunet_ext.errors import UsageError
from nnunet_ext.files import Path, write_files, write_text
path = Path({str(tmp_path)!r}) / "note"
resource.setrlimit(resource.RLIMIT_FSIZE, (10**4, 10**4))
try:
    {call}
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "File too large" in done.stdout
    assert contents(tmp_path) == {"note": b"old"}


def test_file_that_others_write_replaces_the_old_one_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_text("old")

    def fail() -> None:
        with whole_file(path) as part:
            part.write_text("half")
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        fail()
    assert contents(tmp_path) == {"model.pth": b"old"}
    with whole_file(path) as part:
        assert part.name == path.name
        part.write_text("new")
    assert contents(tmp_path) == {"model.pth": b"new"}


def test_folder_that_cant_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "new" / "out"):
        with pytest.raises(UsageError, match=rf"can't write {tmp_path / 'file'}\S*: Not a directory"):
            check_folder(folder)
    check_folder(tmp_path / "new" / "out")
    assert files_in(tmp_path) == ["file"]


def test_file_elsewhere_that_fails_is_not_called_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="scans"), writing(tmp_path / "out" / "shipped"):
        (tmp_path / "scans" / "x").read_text()


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_in(folder) if (folder / name).is_file()}


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), writing(tmp_path):
        raise ValueError("mine")


def test_second_run_in_a_folder_is_refused_and_one_after_it_is_not(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "demo.lock"),
        pytest.raises(UsageError, match=r"another run is at work in .*: wait for its end, or choose"),
        locked(tmp_path / "demo.lock"),
    ):
        pytest.fail("locked twice")
    with locked(tmp_path / "demo.lock"):
        pass


def test_lock_ends_with_its_process_and_not_with_its_children(tmp_path: Path, run_python: RunPython) -> None:
    code = f"""
import os, subprocess, sys
from nnunet_ext.files import Path, locked
with locked(Path({str(tmp_path / "demo.lock")!r})):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    print(child.pid, flush=True)
    os._exit(0)
"""
    child = psutil.Process(int(run_python(code).stdout))
    try:
        with locked(tmp_path / "demo.lock"):
            assert child.is_running()
    finally:
        child.kill()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with locked(tmp_path / "demo.lock"):
        pass


def test_lock_that_cant_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"can't write .*demo\.lock"), locked(tmp_path / "file" / "demo.lock"):
        pytest.fail("locked")
