"""Result folders as nnU-Net leaves them, with scores that the test chooses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from nnunet_ext.comparison import cost
from nnunet_ext.comparison.compare import Comparison
from nnunet_ext.comparison.run_folders import Run
from tests.settings import tiny

DATASET = {
    "name": "Dataset007_Toy",
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "organ": 1, "lesion": 2},
    "file_ending": ".nii.gz",
}
CONFIGURATION = tiny((8, 8, 8)).configuration_manager.configuration  # two stages
CONFIGURATION |= {"data_identifier": "data", "patch_size": [16, 16, 16]}
# so few that a test counts the weights by hand
CONFIGURATION["architecture"]["arch_kwargs"] |= {"n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1]}
Counts = tuple[int, int, int]  # TP, FP, FN
Folds = dict[str, dict[str, list[Counts]]]


def metrics(counts: Counts) -> dict[str, float]:
    """What nnU-Net writes for one case and label."""
    tp, fp, fn = counts
    total = tp + fp + fn
    ratios = {"Dice": 2 * tp / (tp + total), "IoU": tp / total} if total else {"Dice": np.nan, "IoU": np.nan}
    return {**ratios, "TP": tp, "FP": fp, "FN": fn, "TN": 100, "n_pred": tp + fp, "n_ref": tp + fn}


def summary(cases: Mapping[str, Sequence[Counts]], folder: str = "/elsewhere") -> dict[str, Any]:
    """Content of a summary.json with the labels 1, 2, ... of each case."""
    return {
        "metric_per_case": [
            {
                "prediction_file": f"{folder}/{case}.nii.gz",
                "reference_file": f"/elsewhere/{case}.nii.gz",
                "metrics": {str(i): metrics(c) for i, c in enumerate(counts, start=1)},
            }
            for case, counts in cases.items()
        ]
    }


def dice_counts(dice: float) -> Counts:
    """Counts of a reference of 1000 voxels with this Dice, a multiple of 0.001."""
    tp = round(1000 * dice)
    return tp, 1000 - tp, 1000 - tp


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the training of a fold logs.

    Args:
        rise: Of the Dice of validation patches from epoch to epoch.
        started: Seconds since 1970.
        augmentation: Version of batchgeneratorsv2, where it is noted.
    """

    epochs: int = 3
    iterations: int = 50
    rise: float = 0.1
    started: float = 10.0
    augmentation: str | None = None


FULL = Schedule(epochs=1000, iterations=250, rise=0.0)


def write_fold(folder: Path, cases: Mapping[str, Sequence[Counts]], schedule: Schedule = Schedule()) -> None:
    """A finished and validated fold."""
    epochs = schedule.epochs
    (folder / "validation").mkdir(parents=True)
    (folder / "validation" / "summary.json").write_text(json.dumps(summary(cases)))
    values = [np.float32(0.1 + schedule.rise * i) for i in range(epochs)]
    log: dict[str, Any] = {key: values for key in ("train_losses", "val_losses", "mean_fg_dice")}
    log["epoch_start_timestamps"] = [schedule.started + 10.0 * i for i in range(epochs)]
    log["epoch_end_timestamps"] = [schedule.started + 10.0 * i + 4 + i for i in range(epochs)]  # 4, 5, 6 seconds
    torch.save({"logging": log, "network_weights": {}}, folder / "checkpoint_final.pth")
    debug = {"num_epochs": str(epochs), "num_iterations_per_epoch": str(schedule.iterations)}
    debug |= {"gpu_name": "GPU", "torch_version": "2.9"}
    debug |= {"batchgeneratorsv2_version": schedule.augmentation} if schedule.augmentation else {}
    (folder / "debug.json").write_text(json.dumps(debug))


def first_line(found: Comparison) -> str:
    """What the report says before all else."""
    return found.gate.first_line(found.evaluations)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is found but what a test makes."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.delenv(f"nnUNet_{name}", raising=False)


MakeRun = Callable[..., Path]


def write_run(
    root: Path,
    trainer: str,
    folds: Mapping[str, Mapping[str, Sequence[Counts]]],
    plans: str = "nnUNetPlans",
    schedule: Schedule = Schedule(),
    **changes: Any,
) -> Path:
    """Write a result folder: ``write_run(root, "nnUNetTrainer", {"0": {"case_1": [counts, counts]}})``."""
    folder = root / "results" / "Dataset007_Toy" / f"{trainer}__{plans}__3d_fullres"
    folder.mkdir(parents=True)
    for fold, cases in folds.items():
        write_fold(folder / f"fold_{fold}", cases, schedule)
    content = {
        "dataset_name": "Dataset007_Toy",
        "plans_name": plans,
        "configurations": {"3d_fullres": {**CONFIGURATION, **changes}},
        "label_manager": "LabelManager",
    }
    (folder / "plans.json").write_text(json.dumps(content))
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`write_run` in the folder of the test."""
    return partial(write_run, tmp_path)


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests compare runs of one network: it is counted for the first of them."""
    for name in ("count_size", "count_memory"):
        monkeypatch.setattr(cost, name, partial(_count, name))


_counted: dict[str, dict[str, int]] = {}
_really = {name: getattr(cost, name) for name in ("count_size", "count_memory")}


def _count(name: str, run: Run, trusted: bool = False) -> dict[str, int]:
    key = json.dumps([name, run.plans["configurations"], run.dataset, run.trainer, run.configuration, trusted])
    if key not in _counted:
        _counted[key] = _really[name](run, trusted)
    return _counted[key]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but not rendered: each file is the same single pixel."""
    stream = BytesIO()
    Figure().savefig(stream, format="png", dpi=1)
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(stream.getvalue()))


def random_folds(seed: int, shift: float = 0.0, n: int = 12) -> Folds:
    """Two folds of `n` cases in all, whose Dice are random and shifted."""
    random = np.random.default_rng(seed)
    cases = {
        f"case_{i:02d}": [dice_counts(float(np.clip(d, 0, 1))) for d in random.uniform(0.6, 0.8, 2) + shift]
        for i in range(n)
    }
    names = list(cases)
    return {"0": {name: cases[name] for name in names[: n // 2]}, "1": {name: cases[name] for name in names[n // 2 :]}}
