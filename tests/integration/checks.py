"""What a cell must leave behind; that no command raised an error is not enough."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from tests.integration.outcome import CheckError


class RawDataset:
    """A data set in nnU-Net's raw format, as far as predictions must agree with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description: dict[str, Any] = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        self.ending: str = self.description["file_ending"]

    @property
    def predictable(self) -> set[int]:
        """Labels that a prediction may hold: neither unknown ones nor the ignore label."""
        if order := self.description.get("regions_class_order"):
            return {0, *order}
        return {value for name, value in self.description["labels"].items() if name != "ignore"}

    @property
    def scored(self) -> set[str]:
        """Classes or regions as summary.json names them."""
        labels = {name: value for name, value in self.description["labels"].items() if name != "ignore"}
        named = {str(tuple(value) if isinstance(value, list) else value) for value in labels.values()}
        return named - {"0"}

    def unseen(self) -> list[str]:
        """Cases of imagesTs."""
        return sorted(path.name.removesuffix(f"_0000{self.ending}") for path in self._first_channels("imagesTs"))

    def _first_channels(self, part: str) -> Iterable[Path]:
        return (self.folder / part).glob(f"*_0000{self.ending}")

    def image(self, case: str) -> Path:
        """First channel of a case."""
        name = f"{case}_0000{self.ending}"
        places = (self.folder / part / name for part in ("imagesTr", "imagesTs"))
        return next(filter(Path.exists, places))


def check_predictions(folder: Path, cases: Iterable[str], raw: RawDataset) -> None:
    """Every case is there, lies where its image does, and holds known labels alone, never the ignore label.

    Raises:
        CheckError: it does not.
    """
    for case in cases:
        path = folder / f"{case}{raw.ending}"
        if not path.is_file():
            raise CheckError(f"{folder.name} has no prediction of {case}.")
        predicted, image = sitk.ReadImage(str(path)), sitk.ReadImage(str(raw.image(case)))
        for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            wanted, found = getattr(image, what)(), getattr(predicted, what)()
            if not np.allclose(wanted, found, atol=1e-5):
                raise CheckError(f"{case} in {folder.name}: {what[3:].lower()} {found}, that of the image is {wanted}.")
        unknown = {int(value) for value in np.unique(sitk.GetArrayViewFromImage(predicted))} - raw.predictable
        if unknown:
            raise CheckError(f"{case} in {folder.name} holds {sorted(unknown)}, allowed are {sorted(raw.predictable)}.")


def check_probabilities(folder: Path, cases: Iterable[str]) -> None:
    """Every case has probabilities, all finite and from 0 to 1.

    Raises:
        CheckError: it has not.
    """
    for case in cases:
        path = folder / f"{case}.npz"
        if not path.is_file():
            raise CheckError(f"{folder.name} has no probabilities of {case}.")
        with np.load(path) as content:
            values = content["probabilities"]
        if not (np.isfinite(values).all() and values.min() >= -1e-3 and values.max() <= 1 + 1e-3):
            raise CheckError(f"{case} in {folder.name}: probabilities that are not finite, or not from 0 to 1.")


def mean_dice(summary: Path, raw: RawDataset) -> float:
    """Mean Dice that nnU-Net wrote, finite for every class or region.

    Raises:
        CheckError: it is not, or the classes are others.
    """
    if not summary.is_file():
        raise CheckError(f"{summary.parent.name} has no summary.json.")
    content = json.loads(summary.read_text(encoding="utf-8"))
    if set(content["mean"]) != raw.scored:
        raise CheckError(f"summary.json scores {sorted(content['mean'])}, the labels are {sorted(raw.scored)}.")
    dice = {label: scores["Dice"] for label, scores in content["mean"].items()}
    if not all(map(math.isfinite, dice.values())):
        raise CheckError(f"summary.json of {summary.parent.name} has a Dice that is not finite: {dice}.")
    return float(content["foreground_mean"]["Dice"])


def check_weights(checkpoint: Path) -> None:
    """All weights are finite, and the losses that nnU-Net logged.

    Raises:
        CheckError: there are none, or they are not.
    """
    if not checkpoint.is_file():
        raise CheckError(f"{checkpoint.parent.name} has no {checkpoint.name}.")
    content = torch.load(checkpoint, map_location="cpu", weights_only=False)
    tensors = {key: value for key, value in content["network_weights"].items() if isinstance(value, torch.Tensor)}
    wrong = [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if wrong or not tensors:
        raise CheckError(f"{checkpoint.parent.name}: weights that are not finite: {wrong[:3] or 'none at all'}.")
    losses = {key: content["logging"][key] for key in ("train_losses", "val_losses")}
    if not all(values and np.isfinite(values).all() for values in losses.values()):
        raise CheckError(f"{checkpoint.parent.name}: losses that are not finite, or none: {losses}.")


def check_model(folder: Path, splits: list[dict[str, list[str]]], raw: RawDataset) -> float:
    """All folds of a trained model: weights, validation, scores; return the mean Dice over folds.

    Raises:
        CheckError: something is missing or wrong.
    """
    dice = []
    for fold, split in enumerate(splits):
        check_weights(folder / f"fold_{fold}" / "checkpoint_final.pth")
        validation = folder / f"fold_{fold}" / "validation"
        check_predictions(validation, split["val"], raw)
        check_probabilities(validation, split["val"])
        dice.append(mean_dice(validation / "summary.json", raw))
    return sum(dice) / len(dice)
