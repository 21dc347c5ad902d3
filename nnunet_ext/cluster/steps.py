"""The steps of a cross-validation: what each needs, when it is done, and the commands of nnU-Net that do it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from nnunet_ext import registry
from nnunet_ext.cluster.request import CrossValidation, Method, planner_of
from nnunet_ext.cluster.work import CommandKilledError, Commands, StepError
from nnunet_ext.errors import UsageError
from nnunet_ext.files import write_text
from nnunet_ext.nnunet.checkpoints import (
    BEST_CHECKPOINT,
    FINAL_CHECKPOINT,
    LATEST_CHECKPOINT,
    SAVE_REQUEST,
    whole_checkpoints,
)
from nnunet_ext.nnunet.datasets import number_of, read_dataset
from nnunet_ext.nnunet.plans import configuration as configuration_of
from nnunet_ext.nnunet.progress import Progress, read_progress
from nnunet_ext.nnunet.splits import validation_cases
from nnunet_ext.whole import is_whole

_LOOK = 10.0  # seconds between two looks at a training's loss
_ENDING = 60.0  # seconds in which Slurm kills what it has asked to end
_AGAIN = "plan again"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step.

    Args:
        asked: What it is part of.
        name: Of its files; unique.
        dataset: DatasetXXX_Name.
        title: What it does, for people.
        needs: Names of the steps that must be done before.
    """

    asked: CrossValidation
    name: str
    dataset: str
    title: str
    needs: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        """GPUs that it takes."""
        return 0

    @property
    def lock(self) -> Path:
        """File that is locked while somebody does it, also for another cross-validation."""
        return self.asked.output / "locks" / f"{self.name}.lock"

    def is_done(self) -> bool:
        """Whether all that it makes is there, whoever made it."""
        raise NotImplementedError

    def work(self, commands: Commands) -> None:
        """Do it.

        Raises:
            StepError: it can't be done.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Planning(Step):
    """Fingerprint, plans, preprocessed data and split of a data set; what is there is kept."""

    plans: str
    configurations: tuple[str, ...]

    @property
    def lock(self) -> Path:
        """One planner at a time works on a data set."""
        return self._folder / "planning.lock"

    @property
    def _folder(self) -> Path:
        return self.asked.preprocessed / self.dataset

    def is_done(self) -> bool:
        """Whether every training case is preprocessed for every configuration, and split."""
        try:
            return (self._folder / "splits_final.json").is_file() and self._unprepared() == []
        except StepError:  # `work` says what is wrong
            return False

    def work(self, commands: Commands) -> None:
        """Call nnU-Net's commands for what is missing, then make its split, before the folds would at once."""
        number, processes = str(number_of(self.dataset)), commands.variables.get("nnUNet_def_n_proc", "4")
        if not (self._folder / "dataset_fingerprint.json").is_file():
            extract = ["nnUNetv2_extract_fingerprint", "-d", number, "--verify_dataset_integrity", "-np", processes]
            commands.run(extract)
        if not (self._folder / f"{self.plans}.json").is_file():
            commands.run(["nnUNetv2_plan_experiment", "-d", number, "-pl", planner_of(self.plans)])
        if missing := self._unprepared():
            words = ["-d", number, "-plans_name", self.plans, "-c", *missing, "-np", processes]
            commands.run(["nnUNetv2_preprocess", *words])
        self._split()

    def _planned(self) -> dict[str, Any]:
        planned = self.asked.plans_of(self.dataset, self.plans)
        if planned is None:
            raise StepError(f"{self.plans} of {self.dataset} are not planned")
        missing = [name for name in self.configurations if name not in planned["configurations"]]
        if missing:
            raise StepError(
                f"{self.plans} of {self.dataset} have no {missing[0]}, but {', '.join(planned['configurations'])}: "
                "nnU-Net plans some for large images only; leave it out"
            )
        return planned

    def _unprepared(self) -> list[str] | None:
        """Configurations whose data are not preprocessed, one for each folder; None without plans."""
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        from nnunet_ext.plans.shared_data import Preprocessed

        if self.asked.plans_of(self.dataset, self.plans) is None:
            return None
        planned, cases = self._planned(), self._cases()
        missing: dict[str, str] = {}
        truth = self._folder / "gt_segmentations"
        has_truth = all((truth / name).is_file() for name in cases.values())
        for name in self.configurations:
            data = configuration_of(planned, name)["data_identifier"]
            if not (has_truth and Preprocessed(self._folder / data, PlansManager(planned), name).has([*cases])):
                missing.setdefault(data, name)
        return [*missing.values()]

    def _cases(self) -> dict[str, str]:
        """Training cases with the file names of their references.

        Not by nnU-Net's function: its pool of processes would inherit the signals that a job does not heed, and hang.
        """
        raw = self.asked.raw / self.dataset
        is_raw = (raw / "dataset.json").is_file()
        content = read_dataset((raw if is_raw else self._folder) / "dataset.json", _AGAIN)
        ending, named = content["file_ending"], content.get("dataset")
        if is_raw and named:
            return {case: f"{case}{ending}" for case in named}
        files = (raw / "labelsTr" if is_raw else self._folder / "gt_segmentations").glob(f"*{ending}")
        return {path.name.removesuffix(ending): path.name for path in files}

    def _split(self) -> None:
        """Make nnU-Net's split by its own function: trainings that begin at once would each write it."""
        from nnunetv2.utilities.crossval_split import generate_crossval_split

        path = self._folder / "splits_final.json"
        if path.is_file():
            return
        try:
            splits = generate_crossval_split(sorted(self._cases()))
        except ValueError as error:
            raise StepError(f"{self.dataset} can't be split into five folds ({error})") from error
        # Its own writer turns NumPy's strings into text as this does.
        write_text(path, json.dumps([{part: [*map(str, split[part])] for part in split} for split in splits], indent=4))


@dataclass(frozen=True, kw_only=True)
class Training(Step):
    """A fold, trained and validated."""

    method: Method
    configuration: str
    fold: int
    next_stage: str | None = None

    @property
    def gpus(self) -> int:
        """GPUs that it takes."""
        return self.asked.gpus

    @property
    def model(self) -> Path:
        """Results of the training with all folds."""
        name = f"{self.method.trainer}__{self.method.plans}__{self.configuration}"
        return self.asked.results / self.dataset / name

    @property
    def folder(self) -> Path:
        """Results of the fold."""
        return self.model / f"fold_{self.fold}"

    @property
    def lock(self) -> Path:
        """One training at a time works in the folder, whatever cross-validation it belongs to."""
        return self.folder / "cross_validation.lock"

    @property
    def progress(self) -> Progress | None:
        """How far it is."""
        return read_progress(self.folder)

    def is_done(self) -> bool:
        """Whether it is trained and validated, has not diverged, and the next stage has all that it needs."""
        files = (self.folder / FINAL_CHECKPOINT, self.folder / "validation" / "summary.json")
        if not (files[0].is_file() and is_whole(files[1])):
            return False
        progress = self.progress
        return not (progress and progress.is_diverged) and self._has_told_next_stage()

    def _has_told_next_stage(self) -> bool:
        """Whether each validation case is there as the prior of the next stage."""
        folder = self.model / "predicted_next_stage" / str(self.next_stage)
        splits = validation_cases(self.asked.preprocessed / self.dataset) if self.next_stage else []
        cases = splits[self.fold] if self.fold < len(splits) else []
        return all(any((folder / f"{case}{end}").is_file() for end in (".b2nd", ".npz")) for case in cases)

    def work(self, commands: Commands) -> None:
        """Train, or go on where a checkpoint lies; again after a kill, unless the second try gets no further.

        Raises:
            StepError: it failed, or its loss is lost.
        """
        tries = 0  # that have got no further
        while True:
            before = self.mark()
            try:
                commands.run(self._command(), self._watcher())
                self.see_loss()
                return
            except CommandKilledError as error:
                if error.number == signal.SIGTERM:  # Slurm says so to all processes before it kills them
                    time.sleep(_ENDING)
                tries = 0 if self.mark() != before else tries + 1
                if tries == 2:
                    raise

    def _command(self) -> list[str]:
        options = ["-tr", self.method.trainer, "-p", self.method.plans, "-device", self.asked.device]
        options += ["-num_gpus", str(self.gpus)] if self.gpus > 1 else []
        options += ["--npz"] if self.asked.npz else []
        there = whole_checkpoints(self.folder)
        if there:
            options.append("--val" if FINAL_CHECKPOINT in there else "--c")
        return ["nnUNetv2_train", self.dataset, self.configuration, str(self.fold), *options]

    def mark(self) -> tuple[str, int] | None:
        """The checkpoint that nnU-Net would go on from, and when it was written: a run that gets further changes it."""
        paths = (self.folder / name for name in (FINAL_CHECKPOINT, LATEST_CHECKPOINT, BEST_CHECKPOINT))
        return next(((path.name, path.stat().st_mtime_ns) for path in paths if path.is_file()), None)

    def see_loss(self) -> None:
        """See that the training has not diverged.

        Raises:
            StepError: the loss of its last epochs is no number.
        """
        progress = self.progress
        if progress and progress.is_diverged:
            raise StepError(
                f"diverged: the training loss of the last {len(progress.losses)} epochs until {progress.epoch} is no "
                f"number; delete {self.folder} to train it again"
            )

    def _watcher(self) -> Callable[[], None]:
        """Look at the loss now and then: epochs after it is lost are wasted."""
        next_look = [time.monotonic() + _LOOK]

        def watch() -> None:
            if time.monotonic() > next_look[0]:
                next_look[0] = time.monotonic() + _LOOK
                self.see_loss()

        return watch

    def save(self, seconds: float) -> None:
        """Ask a training that runs for a checkpoint where its epoch ends, and wait for it as long as there is time.

        Trainers of this package heed it; others go on from what they have saved by themselves.
        """
        schedule = registry.parse_schedule(self.method.trainer)
        name = schedule.base if schedule else self.method.trainer
        if name not in registry.names("trainers") and not (schedule and name == registry.CORE_TRAINER):
            return
        request, latest = self.folder / SAVE_REQUEST, self.folder / LATEST_CHECKPOINT
        before = latest.stat().st_mtime_ns if latest.exists() else 0
        try:
            request.touch()
        except OSError:  # a full disk, on which no checkpoint could be written either
            return
        end = time.monotonic() + seconds
        while time.monotonic() < end and request.exists():
            time.sleep(0.2)
            if latest.exists() and latest.stat().st_mtime_ns != before:
                break
        request.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Gathering(Step):
    """What is made of all validations of a data set."""

    trainings: tuple[Training, ...] = field(repr=False)

    @property
    def file(self) -> Path:
        """What it makes, last."""
        raise NotImplementedError

    def is_done(self) -> bool:
        """Whether its file is newer than all validations."""
        summaries = [training.folder / "validation" / "summary.json" for training in self.trainings]
        if not self.file.is_file() or not all(path.is_file() for path in summaries):
            return False
        return self.file.stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in summaries)


@dataclass(frozen=True, kw_only=True)
class BestConfiguration(Gathering):
    """The best configuration or ensemble of a method, its postprocessing, and the commands that predict with it."""

    method: Method

    @property
    def lock(self) -> Path:
        """NnU-Net has one file of these for a data set."""
        return self.asked.results / self.dataset / "best_configuration.lock"

    @property
    def file(self) -> Path:
        """NnU-Net's instructions, kept for each method."""
        return self.asked.output / self.dataset / f"{self.method.trainer}__{self.method.plans}.txt"

    def work(self, commands: Commands) -> None:
        """Call nnU-Net's command and keep what it says."""
        configurations = dict.fromkeys(training.configuration for training in self.trainings)
        folds = dict.fromkeys(str(training.fold) for training in self.trainings)
        names = ["-tr", self.method.trainer, "-p", self.method.plans, "-c", *configurations, "-f", *folds]
        ensembles = [] if self.asked.npz and len(configurations) > 1 else ["--disable_ensembling"]
        processes = ["-np", commands.variables.get("nnUNet_def_n_proc", "4")]
        commands.run(["nnUNetv2_find_best_configuration", self.dataset, *names, *ensembles, *processes])
        self.file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.asked.results / self.dataset / "inference_instructions.txt", self.file)


@dataclass(frozen=True, kw_only=True)
class Comparing(Gathering):
    """The report of all methods."""

    @property
    def file(self) -> Path:
        """What the report's figures stand in."""
        return self.asked.output / self.dataset / "comparison" / "report.json"

    def work(self, commands: Commands) -> None:
        """Call `nnunet-ext compare`."""
        models = dict.fromkeys(str(training.model) for training in self.trainings)
        folds = dict.fromkeys(str(training.fold) for training in self.trainings)
        processes = ["-np", commands.variables.get("nnUNet_def_n_proc", "4")]
        output = ["-o", os.path.dirname(self.file)]
        commands.run(["nnunet-ext", "compare", "-m", *models, "-f", *folds, *output, *processes])


def make_steps(asked: CrossValidation) -> dict[str, Step]:
    """All steps by name, each after those that it needs.

    Raises:
        UsageError: a plans file or a split can't be read.
    """
    steps: dict[str, Step] = {}
    for dataset in asked.datasets:
        for step in _of_dataset(asked, dataset):
            steps.setdefault(step.name, step)
    return steps


def _of_dataset(asked: CrossValidation, dataset: str) -> Iterator[Step]:
    before: tuple[str, ...] = ()
    for plans in dict.fromkeys(method.plans for method in asked.methods):
        chains = _chains(asked, dataset, plans)
        planning = Planning(
            asked=asked,
            name=_planning(dataset, plans),
            dataset=dataset,
            title=f"plan {plans}",
            needs=before,
            plans=plans,
            configurations=tuple(dict.fromkeys(stage for chain in chains for stage in chain)),
        )
        yield planning
        before = (planning.name,)
    trainings: list[Training] = []
    for fold in asked.folds_of(dataset):
        for method in asked.methods:
            chains = _chains(asked, dataset, method.plans)
            followers = {stage: following for chain in chains for stage, following in pairwise(chain)}
            for chain in chains:
                made = list(_trainings(asked, dataset, method, chain, fold, followers))
                yield from made
                trainings.append(made[-1])
    yield from _gatherings(asked, dataset, tuple(trainings))


def _planning(dataset: str, plans: str) -> str:
    return f"{dataset}__plan__{plans}"


def _chains(asked: CrossValidation, dataset: str, plans: str) -> list[list[str]]:
    """Each configuration that is asked for after the stages before it.

    Raises:
        UsageError: they lead in a circle.
    """
    chains = []
    for configuration in asked.configurations:
        stages = [configuration]
        while (before := asked.stage_before(dataset, plans, stages[0])) is not None:
            if before in stages:
                raise UsageError(f"{plans} of {dataset}: the stages before {configuration} form a circle: {_AGAIN}.")
            stages.insert(0, before)
        chains.append(stages)
    return chains


def _trainings(
    asked: CrossValidation, dataset: str, method: Method, chain: Sequence[str], fold: int, followers: Mapping[str, str]
) -> Iterator[Training]:
    """All folds of the stages before, each after all of the one before it, then the fold."""
    needs: tuple[str, ...] = (_planning(dataset, method.plans),)
    for stage in chain:
        made = [
            Training(
                asked=asked,
                name=f"{dataset}__{method.trainer}__{method.plans}__{stage}__fold_{number}",
                dataset=dataset,
                title=f"{method.trainer}, {method.plans}, {stage}, fold {number}",
                needs=needs,
                method=method,
                configuration=stage,
                fold=number,
                next_stage=followers.get(stage),
            )
            for number in ([fold] if stage == chain[-1] else asked.all_folds(dataset))
        ]
        yield from made
        needs = tuple(training.name for training in made)


def _gatherings(asked: CrossValidation, dataset: str, trainings: tuple[Training, ...]) -> Iterator[Gathering]:
    """A best configuration is one of all folds."""
    if set(asked.folds_of(dataset)) == set(asked.all_folds(dataset)):
        for method in asked.methods:
            own = tuple(training for training in trainings if training.method == method)
            yield BestConfiguration(
                asked=asked,
                name=f"{dataset}__best__{method.trainer}__{method.plans}",
                dataset=dataset,
                title=f"best configuration of {method.trainer}, {method.plans}",
                needs=tuple(training.name for training in own),
                trainings=own,
                method=method,
            )
    yield Comparing(
        asked=asked,
        name=f"{dataset}__compare",
        dataset=dataset,
        title="compare",
        needs=tuple(training.name for training in trainings),
        trainings=trainings,
    )
