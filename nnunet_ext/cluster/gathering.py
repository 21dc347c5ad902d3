"""What is made of all folds of a data set, as steps of a cross-validation."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_ext.cluster.request import Method
from nnunet_ext.cluster.step import Step
from nnunet_ext.cluster.training import Training
from nnunet_ext.cluster.work import Commands


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
