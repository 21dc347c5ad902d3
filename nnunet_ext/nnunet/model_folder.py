"""What a training leaves: a folder TRAINER__PLANS__CONFIGURATION with plans, data set and folds."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.datasets import read_dataset
from nnunet_ext.nnunet.plans import read_plans

DEPLOYED = "nnUNetTrainerDeployed"  # the trainer of what `nnunet-ext deploy` writes


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A trained model.

    Args:
        folder: Folder of the training.
        plans, dataset: Content of its plans.json and dataset.json.
    """

    folder: Path
    plans: dict[str, Any]
    dataset: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, rule: str, cure: str) -> ModelFolder:
        """Read a folder, under whatever name.

        Args:
            folder: Folder of a training.
            rule: What must be an existing folder, as the start of a sentence.
            cure: What to do when it can't be used, as its end.

        Raises:
            UsageError: there is no such folder, or its files are not complete.
        """
        if not folder.is_dir():
            raise UsageError(f"{rule} an existing folder, got {folder}: {cure}.")
        folder = Path(os.path.realpath(folder))  # `Path.resolve` raises where links lead in a circle
        plans = read_plans(folder / "plans.json", cure)
        return cls(folder=folder, plans=plans, dataset=read_dataset(folder / "dataset.json", cure))

    @property
    def parts(self) -> tuple[str, ...]:
        """Trainer, plans and configuration, where the folder has nnU-Net's name."""
        return tuple(self.folder.name.split("__"))

    @property
    def trainer(self) -> str:
        """Name of the trainer, as in `-tr`."""
        return self.parts[0]

    @property
    def plans_name(self) -> str:
        """Name of the plans, as in `-p`."""
        return self.parts[1]

    @property
    def configuration(self) -> str:
        """Name of the configuration, as in `-c`."""
        return self.parts[2]

    def fold_folder(self, fold: str) -> Path:
        """Folder of a fold."""
        return self.folder / f"fold_{fold}"

    def folds_with(self, file: str = "") -> list[str]:
        """Folds that have a file, "0" before "all"; without `file`, those that have a folder."""
        found = (re.fullmatch(r"fold_(\d+|all)", path.name) for path in self.folder.glob("fold_*"))
        names = sorted((match[1] for match in found if match), key=lambda name: (len(name), name))
        return [name for name in names if (self.fold_folder(name) / file).exists()]
