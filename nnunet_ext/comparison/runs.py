"""Result folders of nnU-Net's trainings: where they lie and what each says of itself."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_ext import registry
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.datasets import dataset_folders, read_dataset
from nnunet_ext.nnunet.plans import configuration, read_plans

_COPY = "copy the whole folder TRAINER__PLANS__CONFIGURATION, or leave the run out"


@dataclass(frozen=True)
class Run:
    """One trained model.

    Args:
        label: what tables and figures call it; unique in a comparison.
        folder: TRAINER__PLANS__CONFIGURATION as nnU-Net names it.
        trainer, configuration: from the folder's name.
        plans, dataset: content of plans.json and dataset.json.
        folds: names of the folds to compare ("0" to "4", "all"), sorted.
    """

    label: str
    folder: Path
    trainer: str
    configuration: str
    plans: dict[str, Any]
    dataset: dict[str, Any]
    folds: tuple[str, ...]

    def fold_folder(self, fold: str) -> Path:
        """Folder of a fold."""
        return self.folder / f"fold_{fold}"

    @property
    def plans_name(self) -> str:
        """Name of the plans, as in `-p`."""
        return self.folder.name.split("__")[1]

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as nnU-Net resolves it; empty where it can't, as accuracy is compared without it."""
        try:
            return configuration(self.plans, self.configuration)
        except UsageError:
            return {}


def find_runs(
    results: Path,
    dataset: str,
    configurations: Sequence[str],
    trainers: Sequence[str],
    plans: Sequence[str],
) -> list[Path]:
    """Folders of all runs of these trainers with these plans and configurations, in this order.

    Args:
        results: what `nnUNet_results` names.
        dataset: number or DatasetXXX_Name.

    Raises:
        UsageError: no such data set, or a trainer, plans or configuration without any run.
    """
    folder = _dataset_folder(results, dataset)
    there = {tuple(path.name.split("__")): path for path in sorted(folder.glob("*__*__*")) if path.is_dir()}
    asked = [(t, p, c) for t in trainers for p in plans for c in configurations]
    found = [names for names in asked if names in there]
    # Said of the option whose value no run has at all, before it is said of a combination that was not trained.
    for having in (there, found):
        for position, option, values in ((0, "-tr", trainers), (1, "-p", plans), (2, "-c", configurations)):
            missing = [value for value in values if value not in {names[position] for names in having}]
            if missing:
                raise UsageError(
                    f"{option} needs runs that lie in {folder}, got {missing[0]}: train it, or choose among "
                    f"{', '.join(path.name for path in there.values()) or 'none'}."
                )
    return [there[names] for names in found]


def _dataset_folder(results: Path, dataset: str) -> Path:
    if not results.is_dir():
        raise UsageError(
            f"nnUNet_results must name an existing folder, got {results}: correct it, or give --results."
        )
    matching = dataset_folders(results, dataset)
    if len(matching) != 1:
        folders = matching or sorted(path for path in results.iterdir() if path.is_dir())
        names = ", ".join(path.name for path in folders) or "nothing"
        raise UsageError(f"-d needs one data set in {results}, got {dataset}: there is {names}.")
    return matching[0]


def read_run(folder: Path, folds: Sequence[str] | None = None) -> Run:
    """Read a result folder.

    Args:
        folder: TRAINER__PLANS__CONFIGURATION.
        folds: names of folds; None: all that are numbered and validated.

    Raises:
        UsageError: the folder isn't nnU-Net's, or an asked fold was not validated.
    """
    found = folder.is_dir()
    folder = Path(os.path.realpath(folder))  # of links in a circle too
    parts = folder.name.split("__")
    if not found or len(parts) != 3:
        raise UsageError(
            f"a run must be an existing folder TRAINER__PLANS__CONFIGURATION, got {folder}: correct the path, or give "
            "its original name back."
        )
    plans = read_plans(folder / "plans.json", _COPY)
    dataset = read_dataset(folder / "dataset.json", _COPY)
    if parts[2] not in plans["configurations"]:
        raise UsageError(
            f"{folder / 'plans.json'} must hold the configuration {parts[2]}, it does not: {_COPY}."
        )
    run = Run(parts[0], folder, parts[0], parts[2], plans, dataset, ())
    return replace(run, folds=_choose_folds(run, folds))


def _choose_folds(run: Run, asked: Sequence[str] | None) -> tuple[str, ...]:
    validated = {
        fold
        for fold in trained_folds(run)
        if (run.fold_folder(fold) / "validation" / "summary.json").is_file()
    }
    if asked is None:
        chosen = tuple(sorted(validated - {"all"}, key=int))
        if not chosen:
            raise UsageError(
                f"{run.folder} must hold a validated fold, it holds none: finish one by "
                f"`{validate_command(run, '0')}`."
            )
        return chosen
    missing = [fold for fold in asked if fold not in validated]
    if missing:
        raise UsageError(
            f"-f needs validated folds, fold_{missing[0]} of {run.folder} has no validation/summary.json: call "
            f"`{validate_command(run, missing[0])}`, or leave the fold out."
        )
    return tuple(dict.fromkeys(asked))


def trained_folds(run: Run) -> list[str]:
    """Folds that have a folder, validated or not."""
    names = [path.name for path in run.folder.glob("fold_*") if path.is_dir()]
    return sorted(match[1] for name in names if (match := re.fullmatch(r"fold_(\d+|all)", name)))


def validate_command(run: Run, fold: str) -> str:
    """nnU-Net's command that validates a trained fold once more."""
    named = (str(run.plans.get("dataset_name", "DATASET")), run.configuration, fold)
    return shlex.join(["nnUNetv2_train", *named, "-tr", run.trainer, "-p", run.plans_name, "--val"])


def labelled(runs: Sequence[Run], names: Sequence[str] = ()) -> list[Run]:
    """Runs with labels that tell them apart: what differs of trainer, plans and configuration, or `names`.

    Raises:
        UsageError: the names are too few, too many or not unique, or a run is given twice.
    """
    if names:
        if len(names) != len(runs) or len(set(names)) != len(names):
            raise UsageError(
                f"--names needs {len(runs)} different names, got {' '.join(names)}: correct them."
            )
        return [replace(run, label=name) for run, name in zip(runs, names, strict=True)]
    schedules = {_suffix(run.trainer) for run in runs}
    parts = [
        (
            run.trainer.removesuffix(_suffix(run.trainer)) if len(schedules) == 1 else run.trainer,
            run.plans_name,
            run.configuration,
        )
        for run in runs
    ]
    differing = [i for i in range(3) if i == 0 or len({part[i] for part in parts}) > 1]
    labels = [", ".join(part[i] for i in differing) for part in parts]
    if len(set(labels)) < len(labels):
        if len({run.folder for run in runs}) < len(runs):
            raise UsageError(f"every run may be given once, got {', '.join(labels)}: leave out the second.")
        labels = [f"{label} ({run.folder.parent.name})" for label, run in zip(labels, runs, strict=True)]
    if len(set(labels)) < len(labels):
        raise UsageError(f"these runs have equal names ({', '.join(labels)}): tell them apart by --names.")
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def _suffix(trainer: str) -> str:
    """The suffix that asks for a schedule, empty without one."""
    schedule = registry.parse_schedule(trainer)
    return trainer[len(schedule.base) :] if schedule else ""
