"""The whole cascade by nnU-Net's own commands, and `nnunet-ext cascade-predict` beside them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

TRAINER, PLANS = "nnUNetTrainerMeCascade_1epochs_1iters", "nnUNetMeCascadePlans"
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def shrink(path: Path) -> None:
    """A small network whose context is larger than its patch."""
    plans = json.loads(path.read_text())
    configurations = plans["configurations"]
    for name in ("3d_fullres", "3d_me_context", "3d_post_concat"):
        configurations[name]["architecture"]["arch_kwargs"].update(features_per_stage=[4, 8, 16])
    configurations["3d_fullres"]["patch_size"] = [16, 16, 16]
    configurations["3d_me_context"].update(patch_size=[24, 24, 24], me_unet={"k": 1.5})
    path.write_text(json.dumps(plans))


@pytest.mark.slow
def test_planned_trained_in_two_stages_and_predicted_in_two_commands_or_one(
    dataset: Callable[[str], int], workspace: Path, command: Command, tmp_path: Path
) -> None:
    identifier = dataset("labels")
    command("nnUNetv2_plan_experiment", "-d", identifier, "-pl", "MeCascadePlanner")
    name = f"Dataset{identifier}_labels"
    shrink(workspace / "preprocessed" / name / f"{PLANS}.json")
    options = ["-p", PLANS, "-tr", TRAINER, "-device", "cpu"]
    for fold in range(5):
        command("nnUNetv2_train", identifier, "3d_me_context", fold, *options)
    command("nnUNetv2_train", identifier, "3d_post_concat", 0, *options)

    unseen = tmp_path / "in"
    unseen.mkdir()
    for channel in (0, 1):
        source = workspace / "raw" / name / "imagesTr" / f"case0_{channel:04d}.nii.gz"
        shutil.copy(source, unseen / f"new_{channel:04d}.nii.gz")
    shared = ["-i", unseen, "-d", identifier, *options, "-f", 0, "-npp", 1, "-nps", 1]
    first, second, ours = tmp_path / "first", tmp_path / "second", tmp_path / "ours"
    command("nnUNetv2_predict", "-o", first, "-c", "3d_me_context", *shared)
    command("nnUNetv2_predict", "-o", second, "-c", "3d_post_concat", *shared, "-prev_stage_predictions", first)
    command("nnunet-ext", "cascade-predict", "-o", ours, *shared)
    for theirs, mine in ((first, tmp_path / "ours_3d_me_context"), (second, ours)):
        assert (theirs / "new.nii.gz").read_bytes() == (mine / "new.nii.gz").read_bytes()
    assert {path.name for path in ours.iterdir()} == {path.name for path in second.iterdir()}
