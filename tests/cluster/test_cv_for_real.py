"""Cross-validations with nnU-Net's own commands on this machine: a cascade, and two planners at once."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from nnunet_ext.demo.phantom import PhantomSpec, write_dataset
from tests.conftest import console_script

pytestmark = pytest.mark.slow
DATASET = "Dataset801_Phantom"


@pytest.fixture(autouse=True)
def phantom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six small scans, in nnU-Net's folders."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    for name, value in {"OMP_NUM_THREADS": "1", "nnUNet_compile": "f", "nnUNet_n_proc_DA": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "raw").mkdir()
    small = PhantomSpec(n_training=6, n_test=1, field_of_view=(120.0, 100.0, 90.0), spacing=(6.0, 6.0, 6.0))
    write_dataset(tmp_path / "raw" / DATASET, small, lambda *_: None)


def started(output: Path, *words: str) -> subprocess.Popen[str]:
    command = [console_script("nnunet-ext"), "cv", "-d", "801", *words, "--gpus", "0", "--wait", "-o", str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_cascade_is_trained_stage_after_stage_and_compared(tmp_path: Path) -> None:
    trainer = "nnUNetTrainerMeCascade_1epochs_1iters"
    words = ("-c", "3d_post_concat", "-tr", f"{trainer}:nnUNetMeCascadePlans", "-f", "0")
    run = started(tmp_path / "cv", *words)
    said, _ = run.communicate(timeout=1800)
    assert run.returncode == 0, said
    models = tmp_path / "results" / DATASET
    first, second = (models / f"{trainer}__nnUNetMeCascadePlans__3d_{stage}" for stage in ("me_context", "post_concat"))
    assert len(list(first.glob("fold_*/validation/summary.json"))) == 5
    assert len(list((first / "predicted_next_stage" / "3d_post_concat").glob("*.b2nd"))) == 6
    assert len(list(second.glob("fold_*/validation/summary.json"))) == 1
    assert (tmp_path / "cv" / DATASET / "comparison" / "report.html").is_file()
    begun = [path.stat().st_mtime for path in second.glob("fold_0/debug.json")]
    assert min(begun) > max(path.stat().st_mtime for path in first.glob("fold_*/validation/summary.json"))


def test_two_planners_at_once_share_one_preprocessed_folder(tmp_path: Path) -> None:
    plans = ("nnUNetPlans", "nnUNetHalfWidthPlans")
    trainers = ("nnUNetTrainer_1epochs_1iters", "nnUNetTrainerHalfWidth_1epochs_1iters")
    runs = [
        started(tmp_path / name, "-c", "3d_fullres", "-tr", f"{trainer}:{name}", "-f", "0")
        for name, trainer in zip(plans, trainers, strict=True)
    ]
    for run in runs:
        said, _ = run.communicate(timeout=1800)
        assert run.returncode == 0, said
    folder = tmp_path / "preprocessed" / DATASET
    planned = [json.loads((folder / f"{name}.json").read_text())["configurations"]["3d_fullres"] for name in plans]
    assert len({configuration["data_identifier"] for configuration in planned}) == 1
    logs = "".join(path.read_text() for name in plans for path in (tmp_path / name / "logs").glob("*__plan__*.log"))
    assert logs.count("$ nnUNetv2_preprocess") == 1
    assert logs.count("$ nnUNetv2_extract_fingerprint") == 1
