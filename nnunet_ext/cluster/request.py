"""What is cross-validated, and where; a folder keeps it for the jobs and for later calls."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_ext import registry
from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json, write_text
from nnunet_ext.nnunet.datasets import dataset_folders, number_of
from nnunet_ext.nnunet.plans import DEFAULT_PLANS, read_plans
from nnunet_ext.nnunet.splits import validation_cases

_NOTE = "cross_validation.json"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
_FOLDS = 5  # that nnU-Net makes where there is no split
_HOST_PLANNERS = {
    DEFAULT_PLANS: "ExperimentPlanner",
    "nnUNetResEncUNetMPlans": "nnUNetPlannerResEncM",
    "nnUNetResEncUNetLPlans": "nnUNetPlannerResEncL",
    "nnUNetResEncUNetXLPlans": "nnUNetPlannerResEncXL",
}
# Stages before, as planners write them; plans that are there say it themselves.
_STAGE_BEFORE = {
    "3d_cascade_fullres": "3d_lowres",
    "2d_post_concat": "2d_me_context",
    "3d_post_concat": "3d_me_context",
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A trainer with the plans that it trains by."""

    trainer: str
    plans: str


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """What is asked for.

    Args:
        datasets: DatasetXXX_Name of each.
        methods: Trainers with plans; the first is the baseline of the comparison.
        configurations: Names; the stage before a cascade's is trained too, and need not be named.
        folds: Numbers; None: all of each data set's split.
        device: "cuda", "cpu" or "mps".
        gpus: GPUs of each training; more than one is nnU-Net's own distributed training.
        npz: Keep the probabilities of the validation, so that ensembles can be found.
        raw, preprocessed, results: What nnU-Net's three variables name.
        output: Absolute folder of states, logs and reports.
    """

    datasets: tuple[str, ...]
    methods: tuple[Method, ...]
    configurations: tuple[str, ...]
    folds: tuple[int, ...] | None
    device: str
    gpus: int
    npz: bool
    raw: Path
    preprocessed: Path
    results: Path
    output: Path

    @property
    def variables(self) -> dict[str, str]:
        """Variables that nnU-Net's commands need."""
        return dict(zip(FOLDERS, map(str, (self.raw, self.preprocessed, self.results)), strict=True))

    def plans_of(self, dataset: str, plans: str) -> dict[str, Any] | None:
        """Content of a plans file; None where it is not planned yet.

        Raises:
            UsageError: the file is no plans file.
        """
        path = self.preprocessed / dataset / f"{plans}.json"
        return read_plans(path, "plan again") if path.exists() else None

    def stage_before(self, dataset: str, plans: str, configuration: str) -> str | None:
        """Configuration whose predictions of all folds a configuration needs to train; None: it is no cascade."""
        planned = self.plans_of(dataset, plans)
        if planned is None:
            return _STAGE_BEFORE.get(configuration)
        found = planned["configurations"].get(configuration, {}).get("previous_stage")
        return str(found) if found else None

    def all_folds(self, dataset: str) -> tuple[int, ...]:
        """Numbers of all folds of a data set's split, or of the split that nnU-Net will make."""
        return tuple(range(len(validation_cases(self.preprocessed / dataset)) or _FOLDS))

    def folds_of(self, dataset: str) -> tuple[int, ...]:
        """Numbers of the folds that are asked for."""
        return self.all_folds(dataset) if self.folds is None else self.folds

    def check(self) -> None:
        """See that it can be trained, as far as that is known before it is planned.

        Raises:
            UsageError: folds outside the split, plans that nobody makes, a configuration that the plans lack.
        """
        for dataset in self.datasets:
            there = self.all_folds(dataset)
            wrong = [fold for fold in self.folds_of(dataset) if fold not in there]
            if wrong:
                raise UsageError(
                    f"-f must be folds of the split of {dataset}, {' '.join(map(str, there))}, got "
                    f"{' '.join(map(str, wrong))}: leave them out, or change its splits_final.json."
                )
            for plans in dict.fromkeys(method.plans for method in self.methods):
                self._check_plans(dataset, plans)

    def _check_plans(self, dataset: str, plans: str) -> None:
        planned = self.plans_of(dataset, plans)
        if planned is None:
            planner_of(plans)
            if not (self.raw / dataset / "dataset.json").is_file():
                raise UsageError(
                    f"{dataset} must be in nnUNet_raw to be planned as {plans}, {self.raw / dataset} has no "
                    "dataset.json: copy the data set there, or its plans and preprocessed data."
                )
            return
        missing = [name for name in self.configurations if name not in planned["configurations"]]
        if missing:
            raise UsageError(
                f"-c must be configurations of the plans, {plans} of {dataset} has no {missing[0]}, but "
                f"{', '.join(planned['configurations'])}: choose among them, or plan again."
            )

    def open(self) -> None:
        """Keep this in the output folder, or see that it holds the same.

        Raises:
            UsageError: the folder belongs to something else, or can't be written.
        """
        path = self.output / _NOTE
        mine = _content(self)
        if not path.exists():
            write_text(path, json.dumps(mine, indent=2) + "\n")
            return
        theirs = read_json(path, "choose another folder by -o")
        # How it is computed may change: on another partition, with more GPUs.
        differing = [key for key in mine if key not in ("device", "gpus") and mine[key] != theirs.get(key)]
        if differing:
            key = differing[0]
            raise UsageError(
                f"{self.output} is the cross-validation of other {key} ({_shown(theirs.get(key))}; now "
                f"{_shown(mine[key])}): choose another folder by -o. Trainings that have ended are not repeated there."
            )
        write_text(path, json.dumps(mine, indent=2) + "\n")

    @classmethod
    def read(cls, output: Path) -> CrossValidation:
        """Read what a folder keeps.

        Raises:
            UsageError: it keeps none.
        """
        path = output / _NOTE
        if not path.is_file():
            raise UsageError(
                f"-o must be the folder of a cross-validation, {output} has no {_NOTE}: give the folder that "
                "`nnunet-ext cv` was called with."
            )
        kept = read_json(path, "call `nnunet-ext cv` with another -o")
        try:
            return cls(
                datasets=tuple(kept["datasets"]),
                methods=tuple(Method(**method) for method in kept["methods"]),
                configurations=tuple(kept["configurations"]),
                folds=None if kept["folds"] is None else tuple(kept["folds"]),
                device=kept["device"],
                gpus=kept["gpus"],
                npz=kept["npz"],
                raw=Path(kept["raw"]),
                preprocessed=Path(kept["preprocessed"]),
                results=Path(kept["results"]),
                output=output,
            )
        except (KeyError, TypeError) as error:
            raise UsageError(f"{path} is damaged ({error!r}): call `nnunet-ext cv` with another -o.") from error


def _content(asked: CrossValidation) -> dict[str, Any]:
    content = json.loads(json.dumps(asdict(asked), default=str))
    del content["output"]  # a folder may be moved
    return dict(content)


def _shown(value: Any) -> str:
    if value is None:
        return "all"
    if isinstance(value, list):
        return " ".join(_shown(item) for item in value)
    return f"{value['trainer']}:{value['plans']}" if isinstance(value, dict) else str(value)


def planner_of(plans: str) -> str:
    """Planner that makes plans of this name unless it is told another.

    Raises:
        UsageError: none does.
    """
    ours = {registry.planned(entry)[1]: entry.name for entry in registry.entries("planners") if not entry.refused}
    found = {**ours, **_HOST_PLANNERS}
    if plans not in found:
        raise UsageError(
            f"plans must be there, or be those of a planner, got {plans}: plan the data set first "
            f"(nnUNetv2_plan_experiment ... -overwrite_plans_name {plans}), or choose among "
            f"{', '.join(sorted(filter(None, found)))}."
        )
    return found[plans]


def methods_of(trainers: Sequence[str], plans: Sequence[str]) -> tuple[Method, ...]:
    """Each trainer with each of the plans; TRAINER:PLANS names plans of its own.

    Raises:
        UsageError: one is named twice, or half of a pair is missing.
    """
    found: list[Method] = []
    for word in trainers:
        trainer, colon, own = word.partition(":")
        if not trainer or (colon and not own):
            raise UsageError(f"-tr must be TRAINER or TRAINER:PLANS, got {word}: correct it.")
        found += [Method(trainer=trainer, plans=name) for name in ([own] if colon else plans)]
    if len(set(found)) < len(found):
        twice = next(method for method in found if found.count(method) > 1)
        raise UsageError(f"-tr and -p name {twice.trainer} with {twice.plans} twice: leave one out.")
    return tuple(found)


def find_datasets(asked: Sequence[str], raw: Path, preprocessed: Path) -> tuple[str, ...]:
    """Full names of data sets that are there, raw or preprocessed.

    Raises:
        UsageError: there is none of a name, or several.
    """
    found = []
    for dataset in asked:
        folders = (*dataset_folders(raw, dataset), *dataset_folders(preprocessed, dataset))
        names = sorted({path.name for path in folders if number_of(path.name) is not None})
        if len(names) != 1:
            there = {path.name for root in (raw, preprocessed) for path in root.glob("Dataset*")}
            raise UsageError(
                f"-d must be data sets in nnUNet_raw or nnUNet_preprocessed, got {dataset}: there is "
                f"{', '.join(names or sorted(there)) or 'none'}: give its number or full name."
            )
        found += names
    for name in found:
        of_number = {path.name for root in (raw, preprocessed) for path in dataset_folders(root, str(number_of(name)))}
        if len(of_number) > 1:
            raise UsageError(
                f"-d must have a number of its own, there is {' and '.join(sorted(of_number))}: rename one of them."
            )
    if len(set(found)) < len(found):
        raise UsageError(f"-d must name each data set once, got {' '.join(found)}: leave one out.")
    return tuple(found)


def folders_of_environment() -> tuple[Path, Path, Path]:
    """What nnU-Net's three variables name.

    Raises:
        UsageError: one is not set.
    """
    for name in FOLDERS:
        if not os.environ.get(name):
            raise UsageError(f"cv needs the environment variable {name}, which is not set: set it.")
    raw, preprocessed, results = (Path(os.path.abspath(os.environ[name])) for name in FOLDERS)
    return raw, preprocessed, results
