"""What validation tells of sparse prediction, against nnU-Net's own validation of the same network, dense."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import get_trainer_from_args
from torch import Tensor

from nnunet_ext.architectures.implicit_unet import ImplicitUNet
from nnunet_ext.trainers import implicit
from nnunet_ext.trainers.dense_check import DenseCheck, mean_difference, missed_objects

FOUND = (
    r"sparse minus dense prediction of (\d) validation cases: mean Dice ([+-]\d\.\d{4}), (\d+) of (\d+) objects missed"
)


def thresholds(network: ImplicitUNet, x: Tensor) -> Tensor:
    """Labels (regions) by grey value, of which sparse prediction finds the inner one in half of the image alone."""
    grey = x[:, :2].mean(1)
    outer, inner = 20 * (grey - 0.3), 20 * (grey - 2.0)
    if network.sparse:
        inner[:, :, :, : grey.shape[3] // 3] = -20
    if network.num_classes == 2:
        return torch.stack([outer, inner], 1)
    return torch.stack([-outer, outer, outer.minimum(inner) + inner], 1)


@pytest.fixture
def trainer_of(dataset: Callable[[str], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Any]:
    """Give an initialised trainer whose network is planted."""

    def make(kind: str) -> Any:
        trainer = get_trainer_from_args(
            str(dataset(kind)), "3d_fullres", 0, "nnUNetTrainerImplicit", "nnUNetPlans", False, torch.device("cpu")
        )
        trainer.initialize()
        trainer.output_folder = str(tmp_path)
        trainer.log_file = str(tmp_path / "log.txt")
        return trainer

    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr(ImplicitUNet, "forward", thresholds)
    monkeypatch.setattr(implicit.ImplicitTrainerMixin, "decoder_width", 4)
    return make


def validate(trainer: Any) -> tuple[float, str]:
    """nnU-Net's mean Dice and the log."""
    trainer.perform_actual_validation()
    folder = Path(trainer.output_folder)
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    log = (folder / "log.txt").read_text()
    (folder / "log.txt").unlink()
    return summary["foreground_mean"]["Dice"], log


@pytest.mark.parametrize("kind", ["labels", "regions", "ignore"])
def test_the_difference_is_that_of_nnunets_own_validations(kind: str, trainer_of: Callable[[str], Any]) -> None:
    trainer = trainer_of(kind)
    sparse, log = validate(trainer)
    found = re.search(FOUND, log)
    assert found is not None, log
    assert "WARNING: sparse and dense prediction must not differ by more than 0.002 Dice" in log
    assert trainer.network.sparse
    trainer.network.sparse = False
    dense, log = validate(trainer)
    assert "sparse" not in log
    assert found[1] == "2"
    assert dense > 0.5
    assert float(found[2]) == pytest.approx(sparse - dense, abs=6e-5)


def test_the_prior_of_a_cascade_is_part_of_the_image(trainer_of: Callable[[str], Any], tmp_path: Path) -> None:
    trainer = trainer_of("labels")
    _, cases = trainer.do_split()
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
    for case in cases:
        labels = np.ones(dataset.load_case(case)[0].shape[1:], np.uint8)
        trainer.dataset_class.save_seg(labels, str(tmp_path / case))
    trainer.is_cascaded, trainer.folder_with_segs_from_previous_stage = True, str(tmp_path)
    seen = set()
    trainer.network.register_forward_pre_hook(lambda network, x: seen.add((network.sparse, x[0].shape[1])))
    _, log = validate(trainer)
    assert re.search(FOUND, log)
    assert seen == {(True, 4), (False, 4)}


def test_a_failed_check_leaves_the_validation_and_says_so(
    trainer_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    trainer = trainer_of("labels")
    monkeypatch.setattr(implicit, "check_against_dense", fails)
    dice, log = validate(trainer)
    assert dice > 0
    assert "sparse prediction was not compared with dense prediction: RuntimeError: out of memory" in log


def test_no_cases_no_check(trainer_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implicit.ImplicitTrainerMixin, "dense_check_cases", 0)
    _, log = validate(trainer_of("labels"))
    assert "dense" not in log


def test_a_difference_within_the_tolerance_is_told_without_a_warning() -> None:
    assert DenseCheck(cases=3, difference=-0.0019, objects=7, missed=1).lines() == [
        "sparse minus dense prediction of 3 validation cases: mean Dice -0.0019, 1 of 7 objects missed"
    ]
    assert len(DenseCheck(cases=3, difference=0.0021, objects=7, missed=1).lines()) == 2


def test_labels_that_nobody_has_do_not_count() -> None:
    assert mean_difference(np.array([[0.5, 0.75], [np.nan, np.nan]])) == -0.25
    assert mean_difference(np.array([[0.0, np.nan]])) == -1.0  # sparse prediction alone found something
    assert mean_difference(np.full((2, 2), np.nan)) == 0.0


@pytest.mark.parametrize("shape", [(1, 9, 9), (9, 9, 9)])
def test_an_object_is_missed_where_no_voxel_of_it_is_found(shape: tuple[int, ...]) -> None:
    dense, sparse = np.zeros((2, *shape), bool)
    dense[0, 1:3, 1:3] = dense[0, 6:8, 6:8] = True
    sparse[0, 1, 1] = sparse[0, 4, 4] = True
    assert missed_objects(sparse, dense) == (2, 1)
    assert missed_objects(sparse, np.zeros(shape, bool)) == (0, 0)
