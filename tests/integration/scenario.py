"""One trainer on one data set, as nnU-Net's integration tests go: all configurations, the best of them, inference.

Every configuration is trained in both folds, validated, and predicts unseen images; then nnU-Net finds the best
configuration or ensemble, and what that predicts is ensembled and postprocessed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from nnunet_ext.aims import DEFAULT
from nnunet_ext.nnunet.teacher import VARIABLE
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.protocols import HasTeacher
from tests.integration import commands
from tests.integration.checks import RawDataset, check_model, check_predictions, check_probabilities, mean_dice
from tests.integration.forms import Form
from tests.integration.outcome import CheckError, Outcome, outcome_of
from tests.integration.plans import FOLDS, PLANS

BEST, INFERENCE = "best", "inference"


def seed() -> None:
    """Make all random numbers of the next command the same in every run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One trainer with one file of plans on one data set.

    Args:
        trainer: Name of the trainer, without a schedule.
        form: The data set, preprocessed.
        planner: Planner of the plans, if it is one of `STAGES`.
        plans: Name of the plans.
        configurations: Configurations in the order of their training.
        folder: Folder that holds nnU-Net's three.
        log: File that gets what the commands print.
    """

    trainer: str
    form: Form
    planner: str = ""
    plans: str
    configurations: tuple[str, ...]
    folder: Path
    log: Path

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the cells."""
        return (*self.configurations, BEST, INFERENCE)

    @property
    def scheduled(self) -> str:
        """Name of the trainer with its schedule."""
        return self.trainer + self.form.source.schedule

    @property
    def results(self) -> Path:
        """The data set's folder of results."""
        return self.folder / "results" / self.form.dataset

    @property
    def raw(self) -> RawDataset:
        """The data set."""
        return RawDataset(self.folder / "raw" / self.form.dataset)

    def model(self, configuration: str) -> Path:
        """Folder of a trained model."""
        return self.results / f"{self.scheduled}__{self.plans}__{configuration}"

    def predicted(self, name: str) -> Path:
        """Folder of predictions of unseen images."""
        return self.results / "predicted" / f"{self.scheduled}__{self.plans}" / name

    @property
    def is_trained(self) -> bool:
        """Whether all models are there."""
        return all(self.model(name).is_dir() for name in self.configurations)

    def run(self, done: dict[str, Outcome]) -> Iterator[tuple[str, Outcome]]:
        """Yield the cells that `done` does not hold, as they end, and add them to it."""
        for step in self.steps:
            if step not in done:
                done[step] = self._inherited(step, done) or outcome_of(partial(self._work(step), done))
                yield step, done[step]

    def clear(self) -> None:
        """Remove predictions, ensembles and models; the control's models teach others and stay."""
        shutil.rmtree(self.predicted("").parent, ignore_errors=True)
        shutil.rmtree(self.results / "ensembles", ignore_errors=True)
        for configuration in self.configurations:
            if self.trainer != DEFAULT:
                shutil.rmtree(self.model(configuration), ignore_errors=True)

    def _work(self, step: str) -> Callable[[dict[str, Outcome]], str]:
        named = {BEST: self._find_best, INFERENCE: self._infer}
        return named.get(step) or partial(self._train, step)

    def _inherited(self, step: str, done: dict[str, Outcome]) -> Outcome | None:
        """What a cell needs did not pass: then it ends as that did."""
        needed = [done[name] for name in self._needed(step)]
        missing = [outcome for outcome in needed if outcome.status != "pass"]
        if not missing or (step == BEST and len(missing) < len(needed)):
            return None
        first = next((outcome for outcome in missing if outcome.status == "fail"), missing[0])
        text = f"not run: {first.text.removeprefix('not run: ')}" if first.status == "fail" else first.text
        return Outcome(status=first.status, text=text)

    def _needed(self, step: str) -> tuple[str, ...]:
        if step == BEST:
            return self.configurations
        if step == INFERENCE:
            return (BEST,)
        previous = self._previous(step)
        return (previous,) if previous else ()

    def _previous(self, configuration: str) -> str | None:
        path = self.folder / "preprocessed" / self.form.dataset / f"{self.plans}.json"
        found: str | None = json.loads(path.read_text())["configurations"][configuration].get("previous_stage")
        return found

    def _command(self, name: str, *arguments: str | int | Path) -> None:
        commands.run(self.log, name, *arguments)

    def _train(self, configuration: str, _: dict[str, Outcome]) -> str:
        """Train and validate both folds, then predict unseen images with both."""
        model, unseen = self.model(configuration), self.predicted(configuration)
        for folder in (model, unseen):
            shutil.rmtree(folder, ignore_errors=True)
        chosen = ("-tr", self.scheduled, "-p", self.plans, "-device", "cpu")
        seed()
        with self._teacher(configuration):
            for fold in FOLDS:
                self._command("nnUNetv2_train", self.form.number, configuration, fold, *chosen, "--npz")
        splits = json.loads((self.folder / "preprocessed" / self.form.dataset / "splits_final.json").read_text())
        dice = check_model(model, splits, self.raw)
        previous = self._previous(configuration)
        prior = ("-prev_stage_predictions", self.predicted(previous)) if previous else ()
        places = ("-i", self.raw.folder / "imagesTs", "-o", unseen, "-d", self.form.number, "-c", configuration)
        options = ("-f", *FOLDS, "--save_probabilities", "--disable_progress_bar", "-npp", 0, "-nps", 0)
        self._command("nnUNetv2_predict", *places, *chosen, *options, *prior)
        check_predictions(unseen, self.raw.unseen(), self.raw)
        check_probabilities(unseen, self.raw.unseen())
        return f"Dice {dice:.3f}"

    def _teacher(self, configuration: str) -> patch.dict:  # type: ignore[type-arg]
        """Name the control's model of this configuration as teacher, where the trainer needs one."""
        needs = isinstance(trainer_class(self.trainer), HasTeacher)
        name = f"{DEFAULT}{self.form.source.schedule}__{PLANS}__{configuration}"
        return patch.dict(os.environ, {VARIABLE: name} if needs else {})

    def _find_best(self, done: dict[str, Outcome]) -> str:
        passed = [name for name in self.configurations if done[name].status == "pass"]
        models = ("-tr", self.scheduled, "-p", self.plans, "-c", *passed, "-f", *FOLDS, "-np", 1)
        self._command("nnUNetv2_find_best_configuration", self.form.number, *models)
        found = json.loads((self.results / "inference_information.json").read_text(encoding="utf-8"))
        wanted = len(passed) * (len(passed) + 1) // 2
        scored = len(found["all_results"])
        if scored != wanted:
            raise CheckError(f"{wanted} models and ensembles of two were to be scored, got {scored}.")
        for name in found["all_results"]:
            mean_dice(self._scored(name) / "summary.json", self.raw)
        chosen = found["best_model_or_ensemble"]["selected_model_or_models"]
        return " and ".join(model["configuration"] for model in chosen)

    def _scored(self, name: str) -> Path:
        """Folder in which nnU-Net has scored a model or an ensemble."""
        if name.startswith("ensemble___"):
            return self.results / "ensembles" / name
        return self.results / name / f"crossval_results_folds_{'_'.join(map(str, FOLDS))}"

    def _infer(self, done: dict[str, Outcome]) -> str:
        """Ensemble, then postprocess what the best one says of unseen images."""
        found = json.loads((self.results / "inference_information.json").read_text(encoding="utf-8"))
        best = found["best_model_or_ensemble"]
        chosen = [model["configuration"] for model in best["selected_model_or_models"]]
        passed = [name for name in self.configurations if done[name].status == "pass"]
        pair = chosen if len(chosen) > 1 else next(map(list, pairwise(passed)), [])
        cases = self.raw.unseen()
        if pair:  # also where a single model is the best
            self._command(
                "nnUNetv2_ensemble", "-i", *map(self.predicted, pair), "-o", self.predicted("ensemble"), "-np", 1
            )
            check_predictions(self.predicted("ensemble"), cases, self.raw)
        source, final = self.predicted("ensemble" if len(chosen) > 1 else chosen[0]), self.predicted("final")
        written = ("-pp_pkl_file", best["postprocessing_file"], "-plans_json", best["some_plans_file"])
        self._command("nnUNetv2_apply_postprocessing", "-i", source, "-o", final, "-np", 1, *written)
        check_predictions(final, cases, self.raw)
        return " and ".join(chosen)
