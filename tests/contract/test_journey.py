"""What a user does with one method, by the standard commands alone: plan, train, predict, deploy, compare."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

SCHEDULE = "_1epochs_2iters"
TRAINER, PLANNER, PLANS = "nnUNetTrainerFasterFusionBN", "FasterFusionUNetPlanner", "nnUNetFasterFusionPlans"
CPU = ("-device", "cpu", "-npp", 1, "-nps", 1)

pytestmark = pytest.mark.slow


def test_planned_trained_predicted_deployed_and_compared(
    dataset: Callable[[str], int],
    workspace: Path,
    command: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    identifier = dataset("labels")
    results = workspace / "results" / f"Dataset{identifier}_labels"
    models = []
    command("nnUNetv2_plan_experiment", "-d", identifier, "-pl", PLANNER)
    for trainer, plans in (("nnUNetTrainer", "nnUNetPlans"), (TRAINER, PLANS)):
        chosen = ("-tr", trainer + SCHEDULE, "-p", plans)
        command("nnUNetv2_train", identifier, "3d_fullres", 0, *chosen, "-device", "cpu")
        models.append(results / f"{trainer}{SCHEDULE}__{plans}__3d_fullres")

    unseen = tmp_path / "in"
    unseen.mkdir()
    for path in (workspace / "raw" / f"Dataset{identifier}_labels" / "imagesTr").glob("case0_*"):
        (unseen / path.name).write_bytes(path.read_bytes())
    asked = ("-d", identifier, "-c", "3d_fullres", "-f", 0, "-tr", TRAINER + SCHEDULE, "-p", PLANS)
    command("nnUNetv2_predict", "-i", unseen, "-o", tmp_path / "out", *asked, *CPU)

    command("nnunet-ext", "deploy", "-m", models[1], "-o", tmp_path / "shipped", "-i", unseen)
    shipped = ("-m", tmp_path / "shipped", "-i", unseen, "-o", tmp_path / "fast", "-f", 0)
    command("nnUNetv2_predict_from_modelfolder", *shipped, *CPU)
    trained, fused = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name / "case0.nii.gz"))) for name in ("out", "fast")
    )
    assert trained.shape == (24, 24, 24)
    assert np.mean(trained == fused) > 0.999  # rounding may turn a voxel where two classes are equal

    command("nnunet-ext", "compare", "-m", *models, "-o", tmp_path / "comparison")
    report = json.loads((tmp_path / "comparison" / "report.json").read_text(encoding="utf-8"))
    assert TRAINER in json.dumps(report)
    assert (tmp_path / "comparison" / "report.html").is_file()
