"""The whole demo with nnU-Net's real commands, interrupted and finished by a second call."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from nnunet_ext.demo.phantom import PhantomSpec, write_dataset
from tests.conftest import console_script

pytestmark = pytest.mark.slow
TRAINERS = ("nnUNetTrainer", "nnUNetTrainerReversible")


def demo(folder: Path, *options: str) -> subprocess.Popen[str]:
    users = {name: str(folder / "users" / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    line = [console_script("nnunet-ext"), "demo", "--output", str(folder / "demo"), "--device", "cpu", *options]
    return subprocess.Popen(
        line, env={**os.environ, **users}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(process: subprocess.Popen[str], log: Path, text: str) -> None:
    deadline = time.monotonic() + 900
    while not (log.is_file() and text in log.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{text!r} did not appear in {log}"
        time.sleep(0.2)


def processes_of(folder: Path) -> list[str]:
    """Commands of the running processes whose environment or command names the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = ((process / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        if str(folder).encode() in command + environment and int(process.name) != os.getpid():
            found.append(command.decode())
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_interrupted_demo_leaves_no_process_and_a_second_call_finishes_it(tmp_path: Path) -> None:
    options = ("--schedule", "2epochs_2iters_NoMirroring")
    name = "nnUNetTrainer_2epochs_2iters_NoMirroring"
    first = demo(tmp_path, *options)
    wait_for(first, tmp_path / "demo" / "logs" / f"train_{name}.log", "Epoch 1")
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=60) == 130
    assert processes_of(tmp_path / "demo") == []

    second = demo(tmp_path, *options)
    output = second.communicate(timeout=1800)[0]
    assert second.returncode == 0, output
    assert "[2/7] plan and preprocess: done by an earlier run" in output
    assert "[3/7] train nnUNetTrainer: done in" in output
    assert "--c\n" in (tmp_path / "demo" / "logs" / f"train_{name}.log").read_text()
    report = tmp_path / "demo" / "report.html"
    assert output.splitlines()[-1] == f"Report: {report}"
    content = json.loads(report.with_suffix(".json").read_text())
    assert [run["trainer"] for run in content["runs"]] == [f"{name}_{options[1]}" for name in TRAINERS]
    assert [run["cost"]["epochs"] for run in content["runs"]] == [2, 2]
    assert [len(evaluation["cases"]) for evaluation in content["evaluations"]] == [3, 2]
    assert not (tmp_path / "users").exists()

    third = demo(tmp_path, *options)
    output = third.communicate(timeout=300)[0]
    assert third.returncode == 0, output
    assert output.count("done by an earlier run") == 7


def test_own_data_set_is_trained_predicted_and_left_as_it_was(tmp_path: Path) -> None:
    raw = tmp_path / "Dataset123_Own"
    write_dataset(raw, PhantomSpec(n_training=7, n_test=0, spacing=(9.0, 9.0, 9.0)))
    before = {path: path.stat().st_mtime_ns for path in raw.rglob("*")}
    options = ("--schedule", "1epochs_2iters", "--trainers", "nnUNetTrainer")
    process = demo(tmp_path, "--raw", str(raw), *options)
    output = process.communicate(timeout=1800)[0]
    assert process.returncode == 0, output
    assert {path: path.stat().st_mtime_ns for path in raw.rglob("*")} == before
    assert len(list((tmp_path / "demo" / "predictions").rglob("*.nii.gz"))) == 2


def test_failing_command_is_one_clear_message(tmp_path: Path) -> None:
    raw = tmp_path / "Dataset123_Own"
    write_dataset(raw, PhantomSpec(n_training=7, n_test=0, spacing=(9.0, 9.0, 9.0)))
    process = demo(tmp_path, "--raw", str(raw), "--device", "mps")
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 1, output
    assert "nnunet-ext demo: `nnUNetv2_train 123 3d_fullres 0" in output
    assert "ended with exit code 1. Log " in output
