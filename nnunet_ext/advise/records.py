"""What is known of each method for a data set and a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from nnunet_ext import aims
from nnunet_ext.advise import measured
from nnunet_ext.memory.tracker import GIB

Size = tuple[int, ...]
DEFAULT_PLANNER = "ExperimentPlanner"
_EXPANDED = "nnUNetTrainerMe"  # measured with a smaller standard patch


@dataclass(frozen=True, kw_only=True)
class Row:
    """A trainer on the plans of a planner.

    Args:
        trainer, planner, plans: Names; the plans' is that which the planner gives them.
        patch: Voxels per axis.
        batch: Patches of a step.
        standard_patch: Patch that all levels are trained on, where that is another (meU-net).
        image: Voxels per axis of a typical image: the median size after resampling.
        expected: Bytes that a GPU must have for the training.
        parameters: Weights in training.
        parameters_deployed: Weights in prediction, fused where the network can be.
        step_operations: Multiply-accumulate operations of a training step; of a cascade of one of each stage.
        case_operations: The same of the prediction of a typical image.
        case_voxels: Voxels of the patches of that prediction.
        has_own_weights: Whether these are nnU-Net's own network and training, whose accuracy is published.
        is_plain: Whether the network is like that which times were measured of: 3D, without a residual encoder.
        reason: Why there is no plan; empty where there is.
    """

    trainer: str
    planner: str
    plans: str = ""
    patch: Size = ()
    batch: int = 0
    standard_patch: Size | None = None
    image: Size = ()
    expected: int = 0
    parameters: int = 0
    parameters_deployed: int = 0
    step_operations: int = 0
    case_operations: int = 0
    case_voxels: int = 0
    has_own_weights: bool = False
    is_plain: bool = True
    reason: str = ""

    @property
    def coverage(self) -> float:
        """Share of a typical image that a patch covers, of each axis at most the whole."""
        return prod(min(1.0, n / size) for n, size in zip(self.patch, self.image, strict=True))

    @property
    def is_default(self) -> bool:
        """Whether this is nnU-Net's own trainer with its own planner."""
        return (self.trainer, self.planner) == (aims.DEFAULT, DEFAULT_PLANNER)

    @property
    def is_research(self) -> bool:
        """Whether the trainer is a switch of a method, for comparisons."""
        method = aims.of(self.trainer)
        return method is not None and method.standing == "research"

    @property
    def measured_step(self) -> float | None:
        """Time of a step over that of default nnU-Net, as measured on the same plans."""
        is_expanded = self.standard_patch is not None
        if not self.is_plain or is_expanded != self.trainer.startswith(_EXPANDED):
            return None
        return measured.STEP.get(self.trainer)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """All rows, the best for the aim first, what has no plan last.

    Args:
        dataset, number: Name of the data set, and what nnU-Net's commands call it.
        configuration: Name.
        target: GB of 2**30 bytes that plans are made for.
        gpu: Where that comes from.
        aim: What the table is sorted by.
        rows: Default nnU-Net among them.
    """

    dataset: str
    number: str
    configuration: str
    target: float
    gpu: str
    aim: aims.Aim
    rows: Sequence[Row]

    @property
    def default(self) -> Row:
        """Default nnU-Net."""
        return next(row for row in self.rows if row.is_default)

    def step(self, row: Row) -> float:
        """Operations of a training step over those of default nnU-Net."""
        return row.step_operations / self.default.step_operations

    def prediction(self, row: Row) -> tuple[float, bool]:
        """Time to predict a typical image over that of default nnU-Net; whether that is measured.

        Else it is predicted from operations.
        """
        time = measured.PREDICTION.get(row.trainer) if row.is_plain else None
        if time is None:
            return row.case_operations / self.default.case_operations, False
        return time * row.case_voxels / self.default.case_voxels, True

    def fits(self, row: Row) -> bool:
        """Whether the GPU has what the training is expected to need."""
        return not row.reason and row.expected <= self.target * GIB

    def value(self, row: Row) -> float:
        """What the aim makes small: the lower, the better."""
        values = {
            "context": lambda: -row.coverage,
            "memory": lambda: row.expected,
            "size": lambda: row.parameters_deployed,
            "speed": lambda: self.prediction(row)[0],
        }
        return float(values[self.aim]())

    def as_dict(self, row: Row) -> dict[str, Any]:
        """A row for JSON, with its ratios to default nnU-Net."""
        if row.reason:
            return asdict(row)
        time, is_measured = self.prediction(row)
        return {
            **asdict(row),
            "coverage": row.coverage,
            "fits": self.fits(row),
            "step_by_operations": self.step(row),
            "step_measured_on_same_plans": row.measured_step,
            "prediction": time,
            "prediction_is_measured": is_measured,
        }
