"""`nnunet-ext deploy --report`: each step from nnU-Net's ensemble to the shipped folder, measured and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ext.cli import main
from nnunet_ext.deploy.report import Row, table
from nnunet_ext.deploy.watched import Usage
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
        "predict.py, onnxruntime",
        "nnUNetTrainerHalfWidthBN, one fold, no mirroring, onnxruntime",
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
    from nnunet_ext.deploy import report

    model = trained("nnUNetTrainerHalfWidthBN", dataset("labels"), tmp_path / "model", (0, 1))
    store(model, 1, logging=Path("x"))  # an object that is neither a tensor nor a number
    images = write_images(model, tmp_path)
    monkeypatch.setattr(report, "run", lambda *_: pytest.fail("nnU-Net was started"))
    assert main(["deploy", "--report", "-m", str(model), "-o", str(tmp_path / "out"), "-i", str(images)]) == 2
    assert "is not a complete checkpoint of nnU-Net" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
