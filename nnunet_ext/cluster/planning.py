"""Planning and preprocessing a data set, as a step of a cross-validation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ext.cluster.request import planner_of
from nnunet_ext.cluster.step import Step
from nnunet_ext.cluster.work import Commands, StepError
from nnunet_ext.errors import UsageError
from nnunet_ext.files import write_text
from nnunet_ext.nnunet.datasets import number_of, read_dataset
from nnunet_ext.nnunet.plans import configuration as configuration_of

_AGAIN = "plan again"


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
        except (StepError, UsageError):  # `work` says what is wrong
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
                "nnU-Net plans some for large images only; leave it out, in another folder by -o"
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
        # Of a raw data set nnU-Net takes what has an image.
        folder, end = (raw / "imagesTr", f"_0000{ending}") if is_raw else (self._folder / "gt_segmentations", ending)
        cases = (path.name.removesuffix(end) for path in folder.glob(f"*{end}"))
        return {case: f"{case}{ending}" for case in cases}

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
