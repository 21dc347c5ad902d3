"""What each trainer of this package is for, and the one to take: the table behind `list`, `advise` and the documents.

Holds names alone and imports nothing of the package. Figures in it are those of docs/benchmarks (tests/test_aims.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

Aim = Literal["context", "memory", "size", "speed"]
Standing = Literal["rival", "method", "research"]

AIMS: tuple[Aim, ...] = get_args(Aim)
OTHER = "other"  # where trainers of other packages stand
DEFAULT = "nnUNetTrainer"

TITLES: dict[Aim, str] = {
    "context": "a larger patch on the same card",
    "memory": "the same patch in less memory",
    "size": "fewer weights to ship",
    "speed": "fast prediction",
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A trainer and what it is for.

    Args:
        trainer: Name of its class.
        aims: What it serves; `list` shows it under the first.
        standing: "rival": nnU-Net's own network by plain means; "method": of a paper; "research": a switch of a
            method, for comparisons.
        recommended: Aim for which it is the one to take -> why.
        plans_of: Trainer whose planners plan for this one too; empty where planners name this one, or none does and
            nnU-Net's own plans are used.
    """

    trainer: str
    aims: tuple[Aim, ...]
    standing: Standing = "method"
    recommended: dict[Aim, str] = field(default_factory=dict)
    plans_of: str = ""


MEMORY: tuple[Aim, ...] = ("memory", "context")
CONTEXT: tuple[Aim, ...] = ("context", "memory")
SMALL: tuple[Aim, ...] = ("size", "speed")

METHODS: tuple[Method, ...] = (
    Method(
        trainer="nnUNetTrainerActivationCheckpointing",
        aims=CONTEXT,
        standing="rival",
        recommended={
            "context": "nnU-Net's own network: its planner spends what recomputing frees on the patch.",
            "memory": "Same weights and results as nnUNetTrainer at 0.31x the peak; on one GPU 2.8x the time per step.",
        },
    ),
    Method(
        trainer="nnUNetTrainerHalfWidthBN",
        aims=SMALL,
        standing="rival",
        recommended={
            "size": "0.25x the weights and operations, 0.44x the peak in training; FasterFusionBN, deployed: 0.23x the "
            "weights, 0.82x the operations, 0.90x the peak. Accuracy not yet compared at convergence.",
            "speed": "On a CPU 4.63x as fast as nnUNetTrainer; FasterFusionFast 2.22x, FasterFusionBN 1.72x. Accuracy "
            "not yet compared at convergence.",
        },
    ),
    Method(trainer=DEFAULT, aims=("context",), standing="rival"),
    Method(trainer="nnUNetTrainerHalfWidth", aims=SMALL, standing="rival", plans_of="nnUNetTrainerHalfWidthBN"),
    Method(trainer="nnUNetTrainerMeUNet", aims=CONTEXT),
    Method(trainer="nnUNetTrainerMeUNetOnePass", aims=CONTEXT, plans_of="nnUNetTrainerMeUNet"),
    Method(trainer="nnUNetTrainerMeCheckpointing", aims=CONTEXT, plans_of="nnUNetTrainerMeUNet"),
    Method(trainer="nnUNetTrainerMeReversible", aims=CONTEXT),
    Method(trainer="nnUNetTrainerMeCascade", aims=CONTEXT),
    Method(trainer="nnUNetTrainerMeCascadeOnePass", aims=CONTEXT, plans_of="nnUNetTrainerMeCascade"),
    Method(trainer="nnUNetTrainerMeCascadeCheckpointing", aims=CONTEXT, plans_of="nnUNetTrainerMeCascade"),
    Method(trainer="nnUNetTrainerReversible", aims=MEMORY),
    Method(trainer="nnUNetTrainerInvertible", aims=MEMORY),
    Method(trainer="nnUNetTrainerPartiallyInvertible", aims=MEMORY),
    Method(trainer="nnUNetTrainerImplicit", aims=MEMORY),
    Method(trainer="nnUNetTrainerFasterFusionBN", aims=SMALL),
    Method(trainer="nnUNetTrainerHalfWidthBNDistilled", aims=SMALL, plans_of="nnUNetTrainerHalfWidthBN"),
    Method(trainer="nnUNetTrainerFasterFusionBNDistilled", aims=SMALL, plans_of="nnUNetTrainerFasterFusionBN"),
    Method(trainer="nnUNetTrainerFasterFusion", aims=SMALL, standing="research"),
    Method(trainer="nnUNetTrainerFasterFusionFast", aims=SMALL, standing="research"),
    Method(trainer="nnUNetTrainerImplicitLite", aims=MEMORY, standing="research", plans_of="nnUNetTrainerImplicit"),
    Method(
        trainer="nnUNetTrainerImplicitLiteDistilled", aims=MEMORY, standing="research", plans_of="nnUNetTrainerImplicit"
    ),
    Method(
        trainer="nnUNetTrainerInvertibleNoVAE", aims=MEMORY, standing="research", plans_of="nnUNetTrainerInvertible"
    ),
    Method(
        trainer="nnUNetTrainerPartiallyInvertibleNoVAE",
        aims=MEMORY,
        standing="research",
        plans_of="nnUNetTrainerPartiallyInvertible",
    ),
)
RESEARCH_PLANNERS = ("ReversibleUNetDeepPlanner",)  # switches of a planner: depth instead of a larger patch
BY_TRAINER = {method.trainer: method for method in METHODS}


def of(trainer: str) -> Method | None:
    """What a trainer of this package is for; None for trainers of others and those that only predict.

    Args:
        trainer: Name without the suffix of a schedule.
    """
    return BY_TRAINER.get(trainer)


def serving(aim: Aim) -> list[Method]:
    """Trainers that serve an aim: the recommended one first, research switches last."""
    rank = {"rival": 1, "method": 2, "research": 3}
    found = [method for method in METHODS if aim in method.aims]
    return sorted(found, key=lambda method: 0 if aim in method.recommended else rank[method.standing])  # stable


def recommended(aim: Aim) -> Method:
    """The one trainer to take for an aim."""
    return serving(aim)[0]
