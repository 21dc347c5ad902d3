"""The two trained models of a cascade, found and checked before anything is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.checkpoints import read_trained
from nnunet_ext.nnunet.datasets import find_dataset
from nnunet_ext.nnunet.model_folder import ModelFolder
from nnunet_ext.nnunet.plans import configuration as configuration_of
from nnunet_ext.nnunet.setting import Setting

RESULTS = "nnUNet_results"
TRAIN = "train both stages first (docs/how-to/cascade.md)"


@dataclass(frozen=True, kw_only=True)
class Stage(ModelFolder):
    """A trained model and the folds that predict.

    Args:
        checkpoints: File of each fold, by the fold's name.
    """

    checkpoints: dict[str, Path]

    @classmethod
    def find(cls, folder: Path, folds: Sequence[str], checkpoint: str, trusted: bool = False) -> Stage:
        """See that everything is there, and that nnU-Net's predictor will run no code that the files hold.

        Args:
            folder: TRAINER__PLANS__CONFIGURATION.
            folds: Names.
            checkpoint: Name of the file in each fold's folder.
            trusted: Let it run whatever code they hold.

        Raises:
            UsageError: something is missing, cut off or not to be trusted.
        """
        model = ModelFolder.read(folder, "the cascade needs", TRAIN)
        there = model.folds_with(checkpoint)
        missing = [fold for fold in folds if fold not in there]
        if missing:
            raise UsageError(
                f"{model.folder} must have {checkpoint} for the folds {' '.join(folds)}, it lacks {' '.join(missing)} "
                f"(there is {' '.join(there) or 'none'}): train them, or choose folds by -f."
            )
        paths = {fold: model.fold_folder(fold) / checkpoint for fold in folds}
        for path in () if trusted else paths.values():
            trained = read_trained(path, f"{TRAIN}, or copy it again")
            Setting(plans=model.plans, dataset=model.dataset, configuration=trained.configuration).builder(
                trained.trainer
            )
        return cls(**vars(model), checkpoints=paths)

    def note(self) -> dict[str, Any]:
        """What a continued prediction must have in common with the first one."""
        stamps = [path.stat() for path in self.checkpoints.values()]
        return {
            "model": str(self.folder),
            "checkpoints": [f"{path.parent.name}/{path.name}" for path in self.checkpoints.values()],
            "written": [[stamp.st_size, stamp.st_mtime_ns] for stamp in stamps],
        }


def find_stages(
    dataset: str,
    plans: str,
    trainer: str,
    configuration: str,
    folds: Sequence[Sequence[str]],
    checkpoint: str,
    trusted: bool = False,
) -> tuple[Stage, Stage]:
    """Find both trained stages below nnUNet_results.

    Args:
        dataset: Number or name.
        plans, trainer: Names.
        configuration: Configuration of stage 2.
        folds: Folds of stage 1 and of stage 2.
        checkpoint: Name of the file in a fold's folder.
        trusted: Let nnU-Net run whatever code the models' files hold.

    Raises:
        UsageError: one is missing or incomplete, or holds code; the configuration has no stage before it; their labels
            differ.
    """
    folder = find_dataset(dataset, "-d", RESULTS, cure=TRAIN)
    second = Stage.find(folder / f"{trainer}__{plans}__{configuration}", folds[1], checkpoint, trusted)
    known = second.plans
    previous = configuration_of(known, configuration).get("previous_stage")
    if previous is None:
        linked = [name for name, values in known["configurations"].items() if "previous_stage" in values]
        raise UsageError(
            f"-c must be the second stage of a cascade, {configuration} has no previous_stage in {plans}: "
            f"{'use ' + ' or '.join(linked) if linked else 'plan with -pl MeCascadePlanner'}."
        )
    first = Stage.find(folder / f"{trainer}__{plans}__{previous}", folds[0], checkpoint, trusted)
    for key in ("labels", "regions_class_order", "channel_names", "file_ending"):
        one, two = first.dataset.get(key), second.dataset.get(key)
        if one != two:
            raise UsageError(
                f"both stages must be trained with the same {key}, got {one} in stage 1 ({first.folder}) and {two} in "
                "stage 2: train stage 1 again, validate all its folds, then train stage 2."
            )
    return first, second
