"""Result folders of nnU-Net's trainings: where they lie and what each says of itself."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_ext import registry
from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT
from nnunet_ext.nnunet.datasets import find_dataset
from nnunet_ext.nnunet.model_folder import ModelFolder
from nnunet_ext.nnunet.plans import configuration
from nnunet_ext.nnunet.training_log import TrainingLog, log_of

RESULTS = "nnUNet_results"
RES_ENC_M = "nnUNetResEncUNetMPlans"
_COPY = "copy the complete folder TRAINER__PLANS__CONFIGURATION, or leave the run out"


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """What `nnunet-ext deploy` noted of the model that it wrote.

    Args:
        trainer, configuration: Names of the training that it came from.
        dtype: Precision that it computes in.
        logs: Fold -> its training; empty in folders of earlier versions.
    """

    trainer: str
    configuration: str
    dtype: str
    logs: Mapping[str, TrainingLog]


@dataclass(frozen=True, kw_only=True)
class Run(ModelFolder):
    """One trained model of a comparison; its folder has nnU-Net's name, or it is a deployed one.

    Args:
        label: What tables and figures call it; unique in a comparison.
        folds: Names of the folds to compare ("0" to "4", "all"), sorted.
        deployed: Where it came from; None: it is a training's own folder.
    """

    label: str
    folds: tuple[str, ...]
    deployed: Deployed | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Trainer, plans and configuration."""
        if self.deployed is None:
            return super().parts
        return self.deployed.trainer, str(self.plans.get("plans_name", "")), self.deployed.configuration

    @property
    def is_res_enc_m(self) -> bool:
        """Whether it is nnU-Net's own ResEnc M, the second baseline of a comparison."""
        own = self.trainer.removesuffix(suffix(self.trainer))
        return self.deployed is None and (own, self.plans_name) == (registry.CORE_TRAINER, RES_ENC_M)

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as nnU-Net resolves it; empty where it can't, as accuracy is compared without it."""
        try:
            return configuration(self.plans, self.configuration)
        except UsageError:
            return {}


def find_runs(
    results: Path | None, dataset: str, configurations: Sequence[str], trainers: Sequence[str], plans: Sequence[str]
) -> list[Path]:
    """Folders of all runs of these trainers with these plans and configurations, in this order.

    Args:
        results: Folder of all results; None: what `nnUNet_results` names.
        dataset: Number or DatasetXXX_Name.

    Raises:
        UsageError: no such data set, or a trainer, plans or configuration without any run.
    """
    folder = find_dataset(dataset, "-d", RESULTS, results, instead="give --results")
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


def read_run(folder: Path, folds: Sequence[str] | None = None) -> Run:
    """Read a result folder.

    Args:
        folder: TRAINER__PLANS__CONFIGURATION.
        folds: Names of folds; None: all that are numbered and validated.

    Raises:
        UsageError: the folder isn't nnU-Net's, or an asked fold was not validated.
    """
    model = ModelFolder.read(folder, "a run must be", _COPY)
    if deployed := _deployed(model):
        has = model.folds_with(FINAL_CHECKPOINT)
        label = f"{deployed.trainer}, deployed {deployed.dtype}"
        return Run(**vars(model), label=label, folds=tuple(f for f in folds or has if f in has), deployed=deployed)
    if len(model.parts) != 3:
        raise UsageError(
            f"a run must be a folder TRAINER__PLANS__CONFIGURATION, got {model.folder}: give its original name back."
        )
    if model.configuration not in model.plans["configurations"]:
        raise UsageError(
            f"{model.folder / 'plans.json'} must hold the configuration {model.configuration}, it does not: {_COPY}."
        )
    return Run(**vars(model), label=model.trainer, folds=_choose_folds(model, folds))


def _deployed(model: ModelFolder) -> Deployed | None:
    """What the plans and deployment.json of a deployed model say; None for a training's own folder."""
    configurations = model.plans["configurations"]
    noted = {n: entry["deployed"] for n, entry in configurations.items() if isinstance(entry.get("deployed"), dict)}
    if not noted:
        return None
    name, entry = next(iter(noted.items()))
    path = model.folder / "deployment.json"
    folds = read_json(path, "deploy the model again").get("folds") if path.is_file() else None
    folds = folds if isinstance(folds, dict) else {}
    records = {f: log_of(v.get("training")) for f, v in folds.items() if isinstance(v, dict)}
    return Deployed(
        trainer=str(entry.get("trainer")),
        configuration=name,
        dtype=str(entry.get("dtype")),
        logs={fold: log for fold, log in records.items() if log is not None},
    )


def _choose_folds(model: ModelFolder, asked: Sequence[str] | None) -> tuple[str, ...]:
    validated = model.folds_with("validation/summary.json")
    if asked is None:
        chosen = tuple(fold for fold in validated if fold != "all")
        if not chosen:
            raise UsageError(
                f"{model.folder} must hold a validated fold, it holds none: finish one by "
                f"`{validate_command(model, '0')}`."
            )
        return chosen
    missing = [fold for fold in asked if fold not in validated]
    if missing:
        raise UsageError(
            f"-f needs validated folds, fold_{missing[0]} of {model.folder} has no validation/summary.json: call "
            f"`{validate_command(model, missing[0])}`, or leave the fold out."
        )
    return tuple(dict.fromkeys(asked))


def validate_command(model: ModelFolder, fold: str) -> str:
    """nnU-Net's command that validates a trained fold once more."""
    named = (str(model.plans.get("dataset_name", "DATASET")), model.configuration, fold)
    return shlex.join(["nnUNetv2_train", *named, "-tr", model.trainer, "-p", model.plans_name, "--val"])


def labelled(runs: Sequence[Run], names: Sequence[str] = ()) -> list[Run]:
    """Runs with labels that tell them apart: what differs of trainer, plans and configuration, or `names`.

    Raises:
        UsageError: the names are too few, too many or not unique, or a run is given twice.
    """
    if names:
        if len(names) != len(runs) or len(set(names)) != len(names):
            raise UsageError(f"--names needs {len(runs)} different names, got {' '.join(names)}: correct them.")
        return [replace(run, label=name) for run, name in zip(runs, names, strict=True)]
    schedules = {suffix(run.trainer) for run in runs}
    parts = [
        (
            _shown_trainer(run, run.trainer.removesuffix(suffix(run.trainer)) if len(schedules) == 1 else run.trainer),
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


def _shown_trainer(run: Run, name: str) -> str:
    return f"{name}, deployed {run.deployed.dtype}" if run.deployed else name


def suffix(trainer: str) -> str:
    """The suffix that asks for a schedule, empty without one."""
    schedule = registry.parse_schedule(trainer)
    return trainer[len(schedule.base) :] if schedule else ""
