"""What is kept of a trained fold: what a comparison reads, no weights, no paths."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import keep_results

MODEL = "nnUNetTrainer__nnUNetPlans__3d_fullres"


def write_fold(fold: Path, is_validated: bool) -> None:
    (fold / "validation").mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        (fold.parent / name).write_text("{}")
    (fold / "debug.json").write_text(json.dumps({"num_epochs": 8, "output_folder": str(fold)}))
    (fold / "learning.json").write_text('{"seed": 0}')
    checkpoint = {"network_weights": {"w": torch.ones(1000)}, "optimizer_state": {}, "logging": {"dice": [0.5]}}
    torch.save(checkpoint, fold / "checkpoint_final.pth")
    case = {
        "prediction_file": str(fold / "a.nii.gz"),
        "reference_file": "/data/a.nii.gz",
        "metrics": {"1": {"Dice": 1}},
    }
    if is_validated:
        (fold / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": [case]}))


def test_what_is_validated_is_kept_without_weights_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = tmp_path / "results" / "Dataset007_Tiny"
    write_fold(dataset / MODEL / "fold_0", is_validated=True)
    write_fold(dataset / MODEL / "fold_1", is_validated=False)
    monkeypatch.setattr(sys, "argv", ["keep_results", str(dataset), str(tmp_path / "kept.tar.xz")])
    keep_results.main()
    with tarfile.open(tmp_path / "kept.tar.xz") as archive:
        kept = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    model = f"Dataset007_Tiny/{MODEL}"
    names = ("checkpoint_final.pth", "debug.json", "learning.json", "validation/summary.json")
    assert set(kept) == {f"{model}/{name}" for name in ("plans.json", "dataset.json", *(f"fold_0/{n}" for n in names))}
    log = torch.load(io.BytesIO(kept[f"{model}/fold_0/checkpoint_final.pth"]), weights_only=True)
    assert log == {"logging": {"dice": [0.5]}}
    assert json.loads(kept[f"{model}/fold_0/debug.json"]) == {"num_epochs": 8}
    (case,) = json.loads(kept[f"{model}/fold_0/validation/summary.json"])["metric_per_case"]
    assert case == {"prediction_file": "a.nii.gz", "reference_file": "a.nii.gz", "metrics": {"1": {"Dice": 1}}}
