"""The standard commands in processes of their own: plan, train, terminate, continue, predict."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from tests.conftest import console_script
from tests.faults.processes import members

TRAINER = "nnUNetTrainerReversible_6epochs_1iters"
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def wait_for(path: Path, process: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not path.is_file():
        assert process.poll() is None, "training ended before it was killed"
        assert time.monotonic() < end, f"no {path.name} within {seconds} s"
        time.sleep(0.05)


def test_planned_trained_terminated_continued_and_predicted(
    dataset: Callable[[str], int], workspace: Path, command: Command, tmp_path: Path
) -> None:
    identifier = dataset("labels")
    command("nnUNetv2_plan_experiment", "-d", identifier, "-pl", "ReversibleUNetPlanner")
    training = [identifier, "3d_fullres", 0, "-tr", TRAINER, "-p", "nnUNetReversiblePlans", "-device", "cpu"]
    folder = workspace / "results" / f"Dataset{identifier}_labels"
    fold = folder / f"{TRAINER}__nnUNetReversiblePlans__3d_fullres" / "fold_0"

    script = console_script("nnUNetv2_train")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([script, *map(str, training)], stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(fold / "checkpoint_latest.pth", process, 300)
            assert len(members(process.pid)) > 1
            process.terminate()
            assert process.wait() == -signal.SIGTERM
            end = time.monotonic() + 60
            while members(process.pid) and time.monotonic() < end:
                time.sleep(0.05)
            assert members(process.pid) == []  # its augmentation processes have ended too
        finally:
            for left in {process.pid, *members(process.pid)}:
                with suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)
            process.wait()
    reached = torch.load(fold / "checkpoint_latest.pth", weights_only=False)["current_epoch"]
    assert 0 < reached < 6

    command("nnUNetv2_train", *training, "--c")
    logs = sorted(fold.glob("training_log*.txt"))
    assert f"Epoch {reached}\n" in logs[-1].read_text().replace(" \n", "\n")
    assert "Epoch 0\n" not in logs[-1].read_text().replace(" \n", "\n")
    assert (fold / "validation" / "summary.json").is_file()

    unseen = tmp_path / "in"
    unseen.mkdir()
    for channel in (0, 1):
        source = workspace / "raw" / f"Dataset{identifier}_labels" / "imagesTr" / f"case0_{channel:04d}.nii.gz"
        (unseen / f"new_{channel:04d}.nii.gz").write_bytes(source.read_bytes())
    options = ["-d", identifier, "-c", "3d_fullres", "-f", 0, "-tr", TRAINER, "-p", "nnUNetReversiblePlans"]
    command("nnUNetv2_predict", "-i", unseen, "-o", tmp_path / "out", *options, "-device", "cpu", "-npp", 1, "-nps", 1)
    segmentation = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "new.nii.gz")))
    assert segmentation.shape == (24, 24, 24)
    assert set(np.unique(segmentation)) <= {0, 1, 2}
