"""The model card says what is known of the model, and nothing that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nnunet_ext.deploy import card
from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.setting import Setting
from tests.settings import tiny


def model_of(folder: Path, summaries: dict[str, Any], checkpoint: str = "checkpoint_final.pth") -> TrainedModel:
    """Folds with these contents of validation/summary.json."""
    setting = tiny()
    dataset = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "a|b": 1, "whole": [1, 2]},
        "numTraining": 7,
        "licence": "CC0",
        "file_ending": ".nii.gz",
    }
    plans = {**setting.plans, "dataset_name": "Dataset007_Tiny"}
    for fold, summary in summaries.items():
        (folder / f"fold_{fold}" / "validation").mkdir(parents=True)
        (folder / f"fold_{fold}" / "validation" / "summary.json").write_text(json.dumps(summary))
    return TrainedModel(
        folder=folder,
        trainer="nnUNetTrainer",
        setting=Setting(plans=plans, dataset=dataset, configuration=setting.configuration),
        checkpoints={fold: folder / f"fold_{fold}" / checkpoint for fold in summaries},
        mirroring_axes=None,
    )


def summary(*dice: float) -> dict[str, Any]:
    return {"metric_per_case": [{"metrics": {"1": {"Dice": d}, "(1, 2)": {"Dice": 0.5}}} for d in dice]}


def test_dice_is_the_mean_over_all_cases_by_the_names_of_the_structures(tmp_path: Path) -> None:
    text = card.text(model_of(tmp_path, {"0": summary(0.9, 0.6), "1": summary(0.3, float("nan"))}), card.STOCK)
    assert "mean of 4 cases" in text
    assert "| a\\|b | 0.600 |" in text
    assert "| whole | 0.500 |" in text
    assert "| training cases | 7 |" in text
    assert "| licence of the data | CC0 |" in text
    assert "-f 0 1" in text


@pytest.mark.parametrize(
    ("fold", "checkpoint", "reason"),
    [
        ("all", "checkpoint_final.pth", "fold all was trained on every case"),
        ("0", "checkpoint_best.pth", "another checkpoint is shipped"),
    ],
)
def test_a_validation_that_says_something_else_is_not_quoted(
    fold: str, checkpoint: str, reason: str, tmp_path: Path
) -> None:
    text = card.text(model_of(tmp_path, {fold: summary(0.9)}, checkpoint), card.STOCK)
    assert reason in text
    assert "0.900" not in text


def test_a_damaged_summary_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"summary.json must hold Dice of each case"):
        card.text(model_of(tmp_path, {"0": {"mean": {}}}), card.STOCK)
