"""Commands as children: their log, their end, and that nothing of them outlives an interruption."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_ext.demo import children
from nnunet_ext.demo.children import Child, environment, find_command, run
from nnunet_ext.demo.errors import ChildError
from nnunet_ext.errors import UsageError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="scripts with a shebang")
MakeChild = Callable[..., Child]


@pytest.fixture
def make_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeChild:
    """Install a Python script as the command nnUNetv2_fake and return a child that runs it."""

    def make(code: str, *arguments: str) -> Child:
        script = tmp_path / "bin" / "nnUNetv2_fake"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!{sys.executable}\n{code}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
        command = ("nnUNetv2_fake", *arguments)
        return Child(command, tmp_path / "logs" / "fake.log", {**os.environ, "PYTHONUNBUFFERED": "1"})

    return make


def ignore(_: str) -> None:
    """Take no notice of output."""


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return status != "Z"


def test_output_goes_to_the_log_and_to_the_callback(make_child: MakeChild) -> None:
    pieces: list[str] = []
    child = make_child("import sys; print('out', *sys.argv[1:]); print('err', file=sys.stderr)", "two words")
    run(child, pieces.append)
    expected = "$ nnUNetv2_fake 'two words'\nout two words\nerr\n"
    assert child.log.read_text() == expected
    assert "".join(pieces) == expected


def test_log_of_an_earlier_run_is_kept(make_child: MakeChild) -> None:
    run(make_child("print('first')"), ignore)
    pieces: list[str] = []
    child = make_child("print('second')")
    run(child, pieces.append)
    assert child.log.read_text() == "$ nnUNetv2_fake\nfirst\n$ nnUNetv2_fake\nsecond\n"
    assert "first" not in "".join(pieces)


def test_failure_names_command_exit_code_log_and_its_end(make_child: MakeChild) -> None:
    child = make_child("import sys\nfor i in range(40): print('line', i)\nsys.exit(7)", "-x", "a b")
    with pytest.raises(ChildError) as caught:
        run(child, ignore)
    first, *tail = str(caught.value).splitlines()
    assert first == f"`nnUNetv2_fake -x 'a b'` ended with exit code 7. Log {child.log}, its end:"
    assert tail == [f"  | line {i}" for i in range(28, 40)]


def test_end_by_a_signal_is_named(make_child: MakeChild) -> None:
    child = make_child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(ChildError, match=r"ended with signal 9 \(out of memory\?\)"):
        run(child, ignore)


def test_full_disk_is_named_with_the_failure(make_child: MakeChild, monkeypatch: pytest.MonkeyPatch) -> None:
    child = make_child("raise SystemExit(1)")
    usage = shutil.disk_usage("/")._replace(free=3 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        ChildError, match=rf"exit code 1\. The disk of {child.log.parent} has only 3 MiB left"
    ):
        run(child, ignore)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("stubborn", [False, True])
def test_interruption_ends_the_child_and_its_own_children(
    make_child: MakeChild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubborn: bool
) -> None:
    monkeypatch.setattr(children, "_GRACE", 0.3)
    code = f"""
import os, signal, time
if {stubborn}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = os.fork()
if grandchild:
    print(f"pids {{os.getpid()}} {{grandchild}} end")
time.sleep(60)
"""
    pids: list[int] = []

    def interrupt(text: str) -> None:
        if match := re.search(r"pids (\d+) (\d+) end", text):
            pids.extend(int(pid) for pid in match.groups())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make_child(code), interrupt)
    deadline = time.monotonic() + 5
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids)


def test_command_that_is_nowhere_is_refused() -> None:
    with pytest.raises(UsageError, match=r"nnUNetv2_gone is neither in .* nor on PATH: install"):
        find_command("nnUNetv2_gone")


def test_command_beside_this_python_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("beside", "elsewhere"):
        (tmp_path / folder).mkdir()
        for name in ("python", "nnUNetv2_fake"):
            (tmp_path / folder / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "beside" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    assert find_command("nnUNetv2_fake") == str(tmp_path / "beside" / "nnUNetv2_fake")
    (tmp_path / "beside" / "nnUNetv2_fake").unlink()
    assert find_command("nnUNetv2_fake") == str(tmp_path / "elsewhere" / "nnUNetv2_fake")


def test_log_that_cant_be_opened_is_named(make_child: MakeChild, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    with pytest.raises(UsageError, match=r"can't write .*fake\.log"):
        run(make_child("print()"), ignore)


def test_without_the_hook_the_command_runs_through_nnunet_ext_run(
    make_child: MakeChild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = make_child("import sys; print(sys.argv[1:])", "-x")
    shutil.copy(tmp_path / "bin" / "nnUNetv2_fake", tmp_path / "bin" / "nnunet-ext")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere" / "python"))
    run(Child(child.command, child.log, {**child.environment, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}), ignore)
    assert child.log.read_text().splitlines()[1] == "['run', 'nnUNetv2_fake', '-x']"


def test_folders_are_the_demos_and_the_users_variables_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_raw", "/the/users")
    monkeypatch.setenv("nnUNet_n_proc_DA", "7")
    monkeypatch.delenv("nnUNet_def_n_proc", raising=False)
    for_child = environment({"nnUNet_raw": tmp_path}, "cpu", is_short=True)
    assert for_child["nnUNet_raw"] == str(tmp_path)
    assert for_child["nnUNet_n_proc_DA"] == "7"
    assert for_child["nnUNet_def_n_proc"] == "2"
    assert os.environ["nnUNet_raw"] == "/the/users"  # noqa: SIM112
    assert "nnUNet_def_n_proc" not in os.environ


def test_gpu_keeps_nnunets_number_of_processes_and_a_full_training_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("nnUNet_def_n_proc", "nnUNet_n_proc_DA", "nnUNet_compile"):
        monkeypatch.delenv(name, raising=False)
    assert "nnUNet_def_n_proc" not in environment({}, "cuda", is_short=True)
    assert environment({}, "cuda", is_short=True)["nnUNet_compile"] == "f"
    assert "nnUNet_compile" not in environment({}, "cuda", is_short=False)
