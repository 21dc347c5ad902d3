"""What every step of a cross-validation has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnunet_ext.cluster.request import CrossValidation
from nnunet_ext.cluster.work import Commands


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step.

    Args:
        asked: What it is part of.
        name: Of its files; unique.
        dataset: DatasetXXX_Name.
        title: What it does, for people.
        needs: Names of the steps that must be done before.
        after: Names of the steps that must have ended before, well or not.
    """

    asked: CrossValidation
    name: str
    dataset: str
    title: str
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

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
