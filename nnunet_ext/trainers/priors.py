"""What a cascade's second stage needs of the first, checked before it trains: every case, whole, with these labels.

nnU-Net itself fails in a background worker at the first case that it happens to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_ext.files import read_json
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT
from nnunet_ext.nnunet.splits import validation_cases
from nnunet_ext.protocols import HostTrainer

_ENDINGS = (".b2nd", ".npz", ".npy")
_NAMED = 5  # cases that a message names


@dataclass(frozen=True, kw_only=True)
class FirstStage:
    """The stage that makes the priors.

    Args:
        command: ``nnUNetv2_train DATASET CONFIGURATION``.
        options: Options of the command, the same for all folds.
        model: Its folder TRAINER__PLANS__CONFIGURATION.
        configuration: Its name.
        priors: Folder that its validations write for this stage.
        splits: Validation cases of each fold.
    """

    command: str
    options: str
    model: Path
    configuration: str
    priors: Path
    splits: Sequence[Sequence[str]]

    def check(self, datasets: Sequence[Any], labels: Sequence[int], read: bool = True) -> None:
        """Check the prior of every case.

        Args:
            datasets: Data sets of nnU-Net with these priors.
            labels: Values that a prior may hold in addition to the background.
            read: Also read them all: shape, labels, whether they are whole.

        Raises:
            ValueError: a prior is missing, unreadable, or belongs to another image or label set.
        """
        holders = {case: dataset for dataset in datasets for case in dataset.identifiers}
        missing = sorted(case for case in holders if not self._has(case))
        if missing:
            raise ValueError(
                f"Stage 2 needs stage 1's prediction of every case, {len(missing)} of {len(holders)} have none in "
                f"{self.priors}{self._cure(missing)}"
            )
        for case, dataset in holders.items() if read else ():
            self._check_case(dataset, case, labels)

    def check_labels(self, dataset_json: Mapping[str, Any]) -> None:
        """Compare the labels that stage 1 was trained with.

        Raises:
            ValueError: they are others.
            UsageError: the file is cut off.
        """
        noted = self.model / "dataset.json"
        if not noted.is_file():
            return
        trained = read_json(noted, "copy it again, or train stage 1 again")
        for key in ("labels", "regions_class_order"):
            if trained.get(key) != dataset_json.get(key):
                raise ValueError(
                    f"Both stages need the same {key}, but stage 1 ({noted}) was trained with {trained.get(key)} and "
                    f"dataset.json now has {dataset_json.get(key)}: restore it, or plan again and train both stages "
                    "again."
                )

    def _has(self, case: str) -> bool:
        return any((self.priors / f"{case}{ending}").is_file() for ending in _ENDINGS)

    def _check_case(self, dataset: Any, case: str, labels: Sequence[int]) -> None:
        try:
            data, _, prior, _ = dataset.load_case(case)
            prior = np.asarray(prior[:])
        except Exception as error:  # what a broken file raises depends on its format and on where it is cut
            raise ValueError(
                f"Stage 1's prediction of {case} in {self.priors} can't be read ({type(error).__name__}: {error}), "
                f"probably because its validation was interrupted{self._cure([case])}"
            ) from error
        if tuple(prior.shape) != tuple(data.shape[1:]):
            raise ValueError(
                f"Stage 1's prediction of {case} must have the shape of the preprocessed image, "
                f"{list(data.shape[1:])}, got {list(prior.shape)}: the data were preprocessed again or another "
                f"stage 1 wrote it{self._cure([case])}"
            )
        if prior.max(initial=0) > max(labels) or not set(np.unique(prior)) <= {0, *labels}:
            raise ValueError(
                f"Stage 1's prediction of {case} must hold labels of {sorted(map(int, labels))}, got "
                f"{sorted(set(np.unique(prior).tolist()) - {0, *labels})}: it belongs to another label set"
                f"{self._cure([case])}"
            )

    def _cure(self, cases: Sequence[str]) -> str:
        """End of a message: which folds validate these cases, and the commands for them."""
        folds = [fold for fold, held_out in enumerate(self.splits) if set(held_out) & set(cases)]
        covered = {case for held_out in self.splits for case in held_out}
        parts = []
        if folds:
            commands = "; ".join(self._command_of(fold) for fold in folds)
            parts.append(f"{'folds' if len(folds) > 1 else 'fold'} {', '.join(map(str, folds))}, run first: {commands}")
        others = [case for case in cases if case not in covered]
        if others:
            named = ", ".join(others[:_NAMED]) + (", ..." if len(others) > _NAMED else "")
            parts.append(
                f"no fold of splits_final.json validates {named} ({len(others)} in all), add them to a fold or take "
                "them out of the training cases"
            )
        return f": {'; '.join(parts)}."

    def _command_of(self, fold: int) -> str:
        trained = (self.model / f"fold_{fold}" / FINAL_CHECKPOINT).is_file()
        return f"{self.command} {fold} {self.options}{' --val' if trained else ''}"


def first_stage(trainer: HostTrainer) -> FirstStage:
    """The stage before that of a trainer.

    Raises:
        ValueError: the plans link the stages in one direction only.
    """
    plans, configuration = trainer.plans_manager, trainer.configuration_name
    previous = trainer.configuration_manager.previous_stage_name
    if configuration not in (plans.get_configuration(previous).next_stage_names or []):
        raise ValueError(
            f"{configuration} has the previous stage {previous}, which must name it as next_stage, got "
            f"{plans.get_configuration(previous).next_stage_names}: add it to the plans, and validate all folds of "
            f"{previous} again."
        )
    priors = Path(trainer.folder_with_segs_from_previous_stage)
    device = "" if trainer.device.type == "cuda" else f" -device {trainer.device.type}"
    return FirstStage(
        command=f"nnUNetv2_train {plans.dataset_name} {previous}",
        options=f"-p {plans.plans_name} -tr {type(trainer).__name__}{device}",
        model=priors.parent.parent,
        configuration=previous,
        priors=priors,
        splits=validation_cases(Path(trainer.preprocessed_dataset_folder_base)),
    )
