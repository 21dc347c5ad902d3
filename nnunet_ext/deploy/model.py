"""Trained models of nnU-Net: a folder, its folds, and the network that its trainer builds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.checkpoints import Trained, read_trained
from nnunet_ext.nnunet.model_folder import DEPLOYED, ModelFolder
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.printable import one_line

_COPY = "give the complete folder TRAINER__PLANS__CONFIGURATION of a training"


@dataclass(frozen=True)
class TrainedModel:
    """A trained model.

    Args:
        folder: Folder that nnU-Net's trainer left.
        trainer: Name of the trainer.
        setting: Plans, data set and configuration.
        checkpoints: File of each fold, by the fold's name.
        mirroring_axes: Axes that prediction may mirror.
    """

    folder: Path
    trainer: str
    setting: Setting
    checkpoints: Mapping[str, Path]
    mirroring_axes: tuple[int, ...] | None

    @classmethod
    def read(
        cls, folder: Path, folds: Sequence[str] | None, checkpoint_name: str, trusted: bool = False
    ) -> TrainedModel:
        """Find the folds and read what the first checkpoint says of the model.

        Args:
            folder: Folder of a training.
            folds: Names; None: all that have the checkpoint, "all" only where there is no other.
            checkpoint_name: File name, as nnU-Net's `-chk`.
            trusted: Build whatever code the plans name.

        Raises:
            UsageError: no such folder, no fold, no or another checkpoint, a model that is deployed already, a trainer
                that is not installed, plans that name code.
        """
        found = ModelFolder.read(folder, "-m needs", _COPY)
        checkpoints = _checkpoints(found, folds, checkpoint_name)
        first = _read(next(iter(checkpoints.values())))
        if first.trainer == DEPLOYED:
            raise UsageError(f"{folder} is deployed already: deploy the training that it came from.")
        setting = Setting(plans=found.plans, dataset=found.dataset, configuration=first.configuration, trusted=trusted)
        setting.builder(first.trainer)  # says when the trainer is not installed, or the plans are not trusted
        return cls(folder, first.trainer, setting, checkpoints, first.mirroring_axes)

    def network(self) -> nn.Module:
        """Build the network of the trainer, for prediction.

        Raises:
            UsageError: the plans don't describe a network of this trainer.
        """
        build = self.setting.builder(self.trainer, deep_supervision=False)
        try:
            return build().eval()
        except Exception as error:  # whatever any network meets in arguments that it was not planned with
            raise UsageError(
                f"{self.trainer} can't build its network from {self.folder / 'plans.json'} ({one_line(error)}): "
                f"{_COPY}."
            ) from error

    def weights(self, fold: str) -> dict[str, Any]:
        """Read the weights of a fold.

        Raises:
            UsageError: the file is not a complete checkpoint of this model.
        """
        checkpoint = _read(self.checkpoints[fold])
        if checkpoint.trainer != self.trainer:
            raise UsageError(
                f"All folds must be of one trainer, {self.checkpoints[fold]} is of {checkpoint.trainer}, "
                f"another one of {self.trainer}: choose folds by --folds."
            )
        return dict(checkpoint.weights)

    def trained_network(self, fold: str) -> nn.Module:
        """Build the network with the weights of a fold.

        Raises:
            UsageError: the fold has no checkpoint of this network.
        """
        network = self.network()
        try:
            network.load_state_dict(self.weights(fold))
        except RuntimeError as error:
            raise UsageError(
                f"The weights of fold {fold} don't fit the network that {self.trainer} builds from plans.json "
                f"({str(error).splitlines()[-1].strip()}): give plans and checkpoints of one training."
            ) from error
        return network


def _checkpoints(model: ModelFolder, folds: Sequence[str] | None, name: str) -> dict[str, Path]:
    found = model.folds_with(name)
    if not found:
        raise UsageError(
            f"{model.folder} must hold fold_*/{name}, there is none: train to the end, or name it by -chk."
        )
    for fold in folds or ():
        if fold not in found:
            raise UsageError(
                f"--folds must have {name} in {model.folder}, fold {fold} has not: choose among {' '.join(found)}."
            )
    numbered = [fold for fold in found if fold != "all"]  # an ensemble of both would count each case twice
    return {fold: model.fold_folder(fold) / name for fold in folds or numbered or found}


def _read(path: Path) -> Trained:
    return read_trained(path, "copy it again from where it was trained")
