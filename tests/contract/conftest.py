"""A small data set in nnU-Net's format, planned and preprocessed by its own functions, once for each kind of labels."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from tests.conftest import console_script
from tests.contract.threads import threads_for_processes

WORKSPACE = Path(tempfile.mkdtemp(prefix="nnunet_ext-tests-"))

# nnU-Net before 2.8 reads its folders when it is imported, so they are set before.
os.environ.update(
    {f"nnUNet_{name}": str(WORKSPACE / name) for name in ("raw", "preprocessed", "results")},
    nnUNet_n_proc_DA="1",
    nnUNet_def_n_proc="1",
    nnUNet_compile="false",
    nnUNet_teacher="untrained_teacher",
)

from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor  # noqa: E402
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments, preprocess  # noqa: E402

from nnunet_ext.check.phantom import write_teacher  # noqa: E402
from nnunet_ext.memory.count import TrainingMemory  # noqa: E402
from nnunet_ext.plans.memory_planner import MemoryPlanner  # noqa: E402

LABELS: dict[str, dict[str, Any]] = {
    "labels": {"labels": {"background": 0, "a": 1, "b": 2}},
    "regions": {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]},
    "ignore": {"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}},
}
IDS = {kind: 901 + i for i, kind in enumerate(LABELS)}
_unused = count(max(IDS.values()) + 1)


def pytest_unconfigure() -> None:
    shutil.rmtree(WORKSPACE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    """Also without nnU-Net's curves, which take longer than the epochs."""
    with threads_for_processes(), patch("nnunetv2.training.logging.nnunet_logger.MetaLogger.plot_progress_png"):
        yield


def run_command(name: str, *arguments: str | int | Path) -> subprocess.CompletedProcess[str]:
    """Run a console command of this environment; it must succeed."""
    command = [console_script(name), *map(str, arguments)]
    environment = {**os.environ, "nnUNet_n_proc_DA": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def write_case(folder: Path, name: str, seed: int, ignore: bool) -> None:
    """One image of two channels with two nested boxes, and its labels."""
    random = np.random.default_rng(seed)
    labels = np.zeros((24, 24, 24), dtype=np.uint8)
    start = random.integers(3, 7, 3)
    a, b, c = start
    labels[a : a + 12, b : b + 12, c : c + 12] = 1
    labels[a + 3 : a + 8, b + 3 : b + 8, c + 3 : c + 8] = 2
    for channel in (0, 1):
        image = labels * (2.0 + channel) + random.normal(0, 0.5, labels.shape)
        path = folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz"
        sitk.WriteImage(sitk.GetImageFromArray(image.astype(np.float32)), str(path))
    if ignore:
        labels[:4] = 3
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(folder / "labelsTr" / f"{name}.nii.gz"))


@cache
def prepare(kind: str) -> int:
    """Write, plan and preprocess the data set of this kind of labels; return its ID."""
    identifier = IDS[kind]
    folder = WORKSPACE / "raw" / f"Dataset{identifier}_{kind}"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for i in range(6):
        write_case(folder, f"case{i}", i, kind == "ignore")
    content = {"channel_names": {"0": "T1", "1": "T2"}, **LABELS[kind], "numTraining": 6, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
    with threads_for_processes(), patch.dict(os.environ, nnUNet_n_proc_DA="1"):
        extractor = DatasetFingerprintExtractor(identifier, num_processes=1)
        extractor.num_foreground_voxels_for_intensitystats = 6_000
        extractor.run()
        with torch.device("meta"):  # for nnU-Net's planner sizes are enough
            plan_experiments([identifier])
        make_narrow(WORKSPACE / "preprocessed" / folder.name / "nnUNetPlans.json")
        preprocess([identifier], configurations=["3d_fullres"], num_processes=[1])
        write_teacher(folder.name, "3d_fullres", range(5))
    return identifier


def make_narrow(path: Path) -> None:
    """Give the networks of these plans few features."""
    plans = json.loads(path.read_text())
    for configuration in plans["configurations"].values():
        arguments = configuration["architecture"]["arch_kwargs"]
        arguments["features_per_stage"] = [f // 4 for f in arguments["features_per_stage"]]
    path.write_text(json.dumps(plans))


@pytest.fixture
def dataset() -> Callable[[str], int]:
    """Give the ID of a preprocessed data set: ``dataset("labels")``, "regions" or "ignore"."""
    return prepare


@pytest.fixture
def memory_by_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan by the voxels of a batch: counting a step takes seconds, and here it matters what becomes of a choice."""

    def step_memory(self: MemoryPlanner, plan: dict[str, Any]) -> TrainingMemory:
        channels = 1.5 if "previous_stage" in plan else 1  # a cascade's second stage has more of them
        size = round(2000 * channels * plan["batch_size"] * self.memory_voxels(plan))
        return TrainingMemory(parameters=0, gradients=0, optimizer=0, held=size, peak=size, workspace=0)

    monkeypatch.setattr(MemoryPlanner, "step_memory", step_memory)


@pytest.fixture(scope="session")
def unused_number() -> Callable[[], int]:
    """Give a data set number that no other test has: nnU-Net refuses two data sets of one number."""
    return lambda: next(_unused)


@pytest.fixture
def workspace() -> Path:
    """The folder that holds nnU-Net's raw, preprocessed and results."""
    return WORKSPACE


@pytest.fixture
def command() -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run a console command: ``command("nnUNetv2_train", ...)``."""
    return run_command
