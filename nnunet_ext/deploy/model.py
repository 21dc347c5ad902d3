"""Trained models of nnU-Net: a folder, its folds, and the network that its trainer builds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nnunet_ext.benchmark.setting import Setting
from nnunet_ext.checkpoints import read_checkpoint
from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json

_COPY = "give the folder TRAINER__PLANS__CONFIGURATION of a training, whole"
DEPLOYED = "nnUNetTrainerDeployed"


@dataclass(frozen=True)
class Model:
    """A trained model.

    Args:
        folder: as nnU-Net's trainer left it.
        trainer: name of the trainer.
        setting: plans, data set and configuration.
        checkpoints: of each fold, by the fold's name.
        mirroring_axes: axes that prediction may mirror.
    """

    folder: Path
    trainer: str
    setting: Setting
    checkpoints: Mapping[str, Path]
    mirroring_axes: tuple[int, ...] | None

    @classmethod
    def read(cls, folder: Path, folds: Sequence[str] | None, checkpoint_name: str) -> Model:
        """Find the folds and read what the first checkpoint says of the model.

        Args:
            folder: of a training.
            folds: names; None: all that have the checkpoint.
            checkpoint_name: as nnU-Net's `-chk`.

        Raises:
            UsageError: no such folder, no fold, no or another checkpoint, a model that is deployed already, a trainer
                that is not installed.
        """
        if not folder.is_dir():
            raise UsageError(f"-m needs an existing folder, got {folder}: {_COPY}.")
        plans = read_json(folder / "plans.json", _COPY)
        dataset = read_json(folder / "dataset.json", _COPY)
        checkpoints = _checkpoints(folder, folds, checkpoint_name)
        first = _read(next(iter(checkpoints.values())))
        trainer = first["trainer_name"]
        if trainer == DEPLOYED:
            raise UsageError(f"{folder} is deployed already: deploy the training that it came from.")
        setting = Setting(plans, dataset, first["init_args"]["configuration"])
        setting.builder(trainer)  # says when the trainer is not installed
        axes = first.get("inference_allowed_mirroring_axes")
        return cls(folder, trainer, setting, checkpoints, None if axes is None else tuple(axes))

    def network(self) -> nn.Module:
        """Build the network of the trainer, for prediction."""
        return self.setting.builder(self.trainer, deep_supervision=False)().eval()

    def weights(self, fold: str) -> dict[str, Any]:
        """Read the weights of a fold.

        Raises:
            UsageError: the file is no whole checkpoint of this model.
        """
        checkpoint = _read(self.checkpoints[fold])
        if checkpoint["trainer_name"] != self.trainer:
            raise UsageError(
                f"All folds must be of one trainer, {self.checkpoints[fold]} is of {checkpoint['trainer_name']}, "
                f"another one of {self.trainer}: choose folds by --folds."
            )
        return dict(checkpoint["network_weights"])


def _checkpoints(folder: Path, folds: Sequence[str] | None, name: str) -> dict[str, Path]:
    found = {path.parent.name.removeprefix("fold_"): path for path in sorted(folder.glob(f"fold_*/{name}"))}
    if not found:
        raise UsageError(
            f"{folder} must hold fold_*/{name}, there is none: train to the end, or name it by -chk."
        )
    for fold in folds or ():
        if fold not in found:
            raise UsageError(
                f"--folds must have {name} in {folder}, fold {fold} has not: choose among {' '.join(found)}."
            )
    return {fold: found[fold] for fold in folds or found}


def _read(path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path, "copy it again from where it was trained")
    needed = ("trainer_name", "init_args", "network_weights")
    missing = [key for key in needed if key not in checkpoint]
    if missing or "configuration" not in checkpoint["init_args"]:
        raise UsageError(
            f"{path} must hold what nnU-Net 2 stores in a checkpoint, it lacks "
            f"{', '.join(missing) or 'configuration'}: give a model that nnU-Net trained."
        )
    return checkpoint
