"""`nnunet-ext deploy --report`: each step from nnU-Net's ensemble to the shipped folder, measured and compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ext.cli import main
from nnunet_ext.deploy import report
from nnunet_ext.deploy.report import Row, table
from nnunet_ext.deploy.watched import Usage
from nnunet_ext.errors import UsageError
from tests.contract.test_deploy import store, trained, write_images
from tests.contract.test_deploy_standalone import smooth


def test_the_table_is_relative_to_the_first_row() -> None:
    rows = [
        Row(name="all", usage=Usage(seconds=80.0, cpu_seconds=100.0, peak_bytes=2**31), equal=1.0, dice=0.9),
        Row(name="one", usage=Usage(seconds=16.0, cpu_seconds=20.0, peak_bytes=2**30), equal=0.9991, dice=None),
    ]
    first, second = table(rows).splitlines()[2:]
    assert first == "| all | 80.0 | 1.00 | 100.0 | 2.00 | 100.0000% | 0.9000 |"
    assert second == "| one | 16.0 | 5.00 | 20.0 | 1.00 | 99.9100% |  |"


@pytest.mark.slow
def test_every_step_is_a_prediction_of_its_own(
    dataset: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = smooth(trained("nnUNetTrainerHalfWidthBN", dataset("labels"), tmp_path / "model", (0, 1)), 2)
    images, labels = write_images(model, tmp_path), tmp_path / "labels"
    labels.mkdir()
    for file in images.iterdir():
        scan = sitk.ReadImage(str(file))
        scan.SetSpacing((1.25,) * 3)  # so that logits are resampled
        sitk.WriteImage(scan, str(file))
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((20, 40, 24), np.uint8)), str(labels / "patient_7.nii.gz"))
    arguments = ["-m", str(model), "-o", str(tmp_path / "out"), "-i", str(images), "-ref", str(labels)]
    assert main(["deploy", "--report", *arguments, "--engines", "onnxruntime", "--student", str(model)]) == 0
    rows = json.loads((tmp_path / "out" / "speed.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "nnU-Net: 2 folds, mirroring",
        "one fold",
        "no mirroring",
        "step 0.75",
        "torch resampling",
        "fused",
        "student: nnUNetTrainerHalfWidthBN",
        "predict.py, onnxruntime",
        "2 folds, no mirroring, onnxruntime",
        "one fold, no mirroring, onnxruntime",
        "student, one fold, no mirroring, onnxruntime",
    ]
    equal = {row["name"]: row["equal"] for row in rows}
    assert equal["nnU-Net: 2 folds, mirroring"] == 1
    assert all(equal[name] >= 0.999 for name in ("torch resampling", "fused", "predict.py, onnxruntime"))
    assert all(row["usage"]["seconds"] > 0 and row["usage"]["peak_bytes"] > 2**20 for row in rows)
    assert all(0 < row["dice"] <= 1 for row in rows)
    assert (tmp_path / "out" / "speed.svg").read_bytes().startswith(b"<?xml")
    assert "| predict.py, onnxruntime |" in capsys.readouterr().out
    assert "| predict.py, onnxruntime |" in (tmp_path / "out" / "speed.md").read_text()


def test_a_checkpoint_that_holds_code_is_refused_before_nnunet_reads_it(
    dataset: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained("nnUNetTrainerHalfWidthBN", dataset("labels"), tmp_path / "model", (0, 1))
    store(model, 1, logging=Path("x"))  # an object that is neither a tensor nor a number
    images = write_images(model, tmp_path)
    monkeypatch.setattr(report, "run", lambda *_: pytest.fail("nnU-Net was started"))
    assert main(["deploy", "--report", "-m", str(model), "-o", str(tmp_path / "out"), "-i", str(images)]) == 2
    assert "is not a complete checkpoint of nnU-Net" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_report_that_ended_early_goes_on(
    dataset: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained("nnUNetTrainer", dataset("labels"), tmp_path / "model", (0, 1))
    images, output, measured = write_images(model, tmp_path), tmp_path / "out", []

    def predict(command: Sequence[str], what: str) -> Usage:
        if len(measured) == stops_at:
            raise UsageError(f"{what} failed.")
        measured.append(what)
        predicted = Path(command[command.index("-o") + 1])
        predicted.mkdir()
        labels = np.full((20, 40, 24), len(measured) > 1, np.uint8)  # the first differs from all others
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(predicted / "patient_7.nii.gz"))
        return Usage(seconds=8.0 / len(measured), cpu_seconds=1.0, peak_bytes=1)

    monkeypatch.setattr(report, "run", predict)
    command = ["deploy", "--report", "-m", str(model), "-o", str(output), "-i", str(images), "--engines", "onnxruntime"]
    stops_at = 0
    assert main(command) == 2
    assert measured == []
    assert not output.exists()
    stops_at = 2
    assert main(command) == 2
    assert "no mirroring failed" in capsys.readouterr().err
    assert "| one fold |" in (output / "speed.md").read_text()

    assert main([*command, "--folds", "0"]) == 2
    assert "holds rows of other models, scans, engines" in capsys.readouterr().err
    scan = next(images.iterdir())
    content = scan.read_bytes()
    sitk.WriteImage(sitk.ReadImage(str(scan)) + 1, str(scan))
    assert main(command) == 2
    scan.write_bytes(content)
    stops_at = -1
    assert main(command) == 0
    rows = json.loads((output / "speed.json").read_text())["rows"]
    assert [row["name"] for row in rows] == measured
    assert measured == [
        "nnU-Net: 2 folds, mirroring",
        "one fold",
        "no mirroring",
        "step 0.75",
        "predict.py, onnxruntime",
        "2 folds, no mirroring, onnxruntime",
        "one fold, no mirroring, onnxruntime",
    ]
    assert [row["equal"] for row in rows] == [1.0] + [0.0] * 6
    assert {path.name for path in output.iterdir()} == {"speed.json", "speed.md", "speed.svg"}
    assert main(command) == 2
    assert "-o needs a folder that does not exist" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_write_loses_no_row(dataset: Callable[[str], int], tmp_path: Path) -> None:
    """In a process that has started no threads, since it forks."""
    model = trained("nnUNetTrainer", dataset("labels"), tmp_path / "model")
    images = write_images(model, tmp_path)
    code = f"from {__name__} import kill_at_every_write as run; run({str(model)!r}, {str(images)!r}, {str(tmp_path)!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def kill_at_every_write(model: str, images: str, folder: str) -> None:
    """Files appear by renaming: a run is killed before the first such call, or the second, ..., and goes on."""
    output, measured, names = Path(folder, "out"), Path(folder, "measured"), ["one", "two"]

    def predict(command: Sequence[str], what: str) -> Usage:
        with measured.open("a") as stream:
            stream.write(f"{what} ")
        predicted = Path(command[command.index("-o") + 1])
        predicted.mkdir()
        sitk.WriteImage(sitk.Image(24, 40, 20, sitk.sitkUInt8), str(predicted / "patient_7.nii.gz"))
        return Usage(seconds=1.0, cpu_seconds=1.0, peak_bytes=1)

    report.run = predict
    report._steps = lambda *_: [report.Step(name=name, command=()) for name in names]
    command = ["deploy", "--report", "-m", model, "-o", str(output), "-i", images, "--engines", "onnxruntime"]
    for calls in range(60):
        shutil.rmtree(output, ignore_errors=True)
        measured.write_text("")
        if status(calls, command) == 0:
            break
        stored = output / "unfinished" / "rows.json"
        kept = [row["name"] for row in json.loads(stored.read_text())["rows"]] if stored.exists() else []
        first = measured.read_text().split()
        assert first[:-1] == kept[: len(first) - 1]  # of what was measured, all but the last is stored
        ended = (output / "speed.json").exists() and not (output / "unfinished").exists()
        assert status(1000, command) == (2 if ended else 0)
        assert measured.read_text().split() == first + (names[len(kept) :] if not ended else [])
        assert [row["name"] for row in json.loads((output / "speed.json").read_text())["rows"]] == names
        assert {"speed.json", "speed.md", "speed.svg"} <= {path.name for path in output.iterdir()}
    assert 8 < calls < 60


def status(calls: int, command: list[str]) -> int | None:
    """How a run ends that may rename files so many times."""
    process = get_context("fork").Process(target=killed_after, args=(calls, command))
    process.start()
    process.join()
    return process.exitcode


def killed_after(calls: int, command: list[str]) -> None:
    """Run a command in a process that ends without a word instead of renaming a file once more."""
    left = iter(range(calls))

    def counted(rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(*paths: Any) -> None:
            if next(left, None) is None:
                os._exit(9)
            rename(*paths)

        return renamed

    os.rename, os.replace = counted(os.rename), counted(os.replace)
    os._exit(main(command))


def test_damaged_scans_are_told_before_the_first_row(
    dataset: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained("nnUNetTrainer", dataset("labels"), tmp_path / "model")
    images = write_images(model, tmp_path)
    scan = next(images.iterdir())
    scan.write_bytes(scan.read_bytes()[:-100])
    monkeypatch.setattr(report, "run", lambda *_: pytest.fail("nnU-Net was started"))
    assert main(["deploy", "--report", "-m", str(model), "-o", str(tmp_path / "out"), "-i", str(images)]) == 2
    assert "must be a complete image" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
