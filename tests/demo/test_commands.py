"""Commands as child processes: their log, their end, and that nothing of them outlives an interruption."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from nnunet_ext.demo import commands, workflow
from nnunet_ext.demo.commands import CommandError, environment, processes
from nnunet_ext.demo.settings import Demo
from nnunet_ext.errors import UsageError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="scripts with a shebang")
NAME = "nnUNetv2_fake"
Run = Callable[..., list[str]]
# Starts a process in a session of its own and one whose parent ends; stubborn ones take no notice of a polite end.
FAMILY = """
import os, signal, subprocess, sys, time
if {stubborn}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import signal, time; signal.signal(15, {stubborn}); time.sleep(60)"]
subprocess.Popen(sleep, start_new_session=True)
subprocess.run([sys.executable, "-c", "import subprocess, sys; subprocess.Popen(sys.argv[1:])", *sleep])
print("started")
"""


@pytest.fixture
def run(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Install a Python script as the command nnUNetv2_fake, run it, and return what was said of its output."""

    def _run(code: str, *arguments: str, on_text: Callable[[str], None] = lambda _: None) -> list[str]:
        script, said = demo.root.parent / "bin" / NAME, []
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!{sys.executable}\n{code}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)

        def listen(text: str) -> None:
            said.append(text)
            on_text(text)

        commands.run([NAME, *arguments], demo.root / "fake.log", demo, listen)
        return said

    return _run


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_output_goes_to_the_callback_and_to_the_log_which_grows(run: Run, demo: Demo) -> None:
    said = run("import sys; print('out', *sys.argv[1:]); print('err', file=sys.stderr)", "two words")
    assert said[-1] == "out two words\nerr\n"
    assert run("print('second')")[-1] == "second\n"
    log = (demo.root / "fake.log").read_text()
    assert log == "$ nnUNetv2_fake 'two words'\nout two words\nerr\n$ nnUNetv2_fake\nsecond\n"


def test_failure_names_command_exit_code_log_and_its_end(run: Run, demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandError) as caught:
        run("import sys\nfor i in range(40): print('line', i)\nsys.exit(7)", "-x", "a b")
    first, *tail = str(caught.value).splitlines()
    assert first == f"`nnUNetv2_fake -x 'a b'` ended with exit code 7. Log {demo.root / 'fake.log'}, its end:"
    assert tail == [f"  | line {i}" for i in range(28, 40)]
    usage = shutil.disk_usage("/")._replace(free=3 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CommandError, match=rf"exit code 1\. The disk of {demo.root} has only 3 MB left"):
        run("raise SystemExit(1)")
    with pytest.raises(CommandError, match=r"ended with signal 9 \(out of memory\?\)"):
        run("import os; os.kill(os.getpid(), 9)")


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("ends", ["interrupted", "failed"])
def test_all_that_a_command_has_started_ends_with_it(
    run: Run, demo: Demo, monkeypatch: pytest.MonkeyPatch, ends: str, stubborn: bool
) -> None:
    monkeypatch.setattr(commands, "_GRACE", 0.5)
    found: list[psutil.Process] = []

    def listen(text: str) -> None:
        if "started" in text:
            found.extend(processes(demo.root))
            if ends == "interrupted":
                raise KeyboardInterrupt

    code = FAMILY.format(stubborn=int(stubborn)) + ("sys.exit(1)" if ends == "failed" else "time.sleep(60)")
    with pytest.raises(CommandError if ends == "failed" else KeyboardInterrupt):
        run(code, on_text=listen)
    assert len({process.pid for process in found}) >= 2
    assert not any(map(lives, found))


def test_interruption_is_not_held_up_by_a_process_that_cannot_be_ended(
    run: Run, demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_GRACE", 0.1)
    monkeypatch.setattr(commands, "_end_all", lambda _: None)

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("import time; time.sleep(20)", on_text=interrupt)
    (left,) = processes(demo.root)
    left.kill()
    left.wait()


def test_process_that_outlives_a_killed_demo_is_waited_for(demo: Demo, run: Run) -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    run(code)
    (demo.root / "demo.json").write_text("{}")
    (left,) = processes(demo.root)
    try:
        with pytest.raises(UsageError, match=rf"another run is at work in .*process {left.pid} of .*wait for its"):
            workflow.run(demo, lambda *_: pytest.fail("it began"))
    finally:
        left.kill()


def test_command_beside_this_python_comes_first_or_nnunet_ext_run_without_the_hook(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("print('on PATH')") == ["on PATH\n"]
    (tmp_path / "beside").mkdir()
    for name in (NAME, "nnunet-ext"):
        (tmp_path / "beside" / name).write_text(f"#!/bin/sh\necho beside: {name} $*\n")
        (tmp_path / "beside" / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "beside" / "python"))
    assert run("", "-x") == ["beside: nnUNetv2_fake -x\n"]
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert run("", "-x") == ["beside: nnunet-ext run nnUNetv2_fake -x\n"]
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(UsageError, match=r"nnunet-ext is neither in .* nor on PATH: install"):
        run("")


def test_log_that_cant_be_opened_is_named(run: Run, demo: Demo) -> None:
    demo.root.write_text("a file where the folder should be")
    with pytest.raises(UsageError, match=r"can't write .*fake\.log"):
        run("print()")


def test_folders_are_the_demos_and_the_users_variables_stay(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_def_n_proc", "nnUNet_compile"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("nnUNet_raw", "/the/users")
    monkeypatch.setenv("nnUNet_n_proc_DA", "7")
    before, found = dict(os.environ), environment(demo)
    names = ("nnUNet_raw", "nnUNet_n_proc_DA", "nnUNet_def_n_proc", "nnUNet_compile")
    assert [found[name] for name in names] == [str(demo.root / "nnUNet_raw"), "7", "2", "f"]
    assert dict(os.environ) == before
    # A GPU is fed by as many processes as nnU-Net takes, a full training is worth compiling.
    assert not {"nnUNet_def_n_proc", "nnUNet_compile"} & {*environment(replace(demo, schedule="full", device="cuda"))}
