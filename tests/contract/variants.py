"""Trainers that differ from another of their network by a width, a norm, a branch left out or what is recomputed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

VARIANTS = {
    "nnUNetTrainerFasterFusionBNDistilled",
    "nnUNetTrainerFasterFusionFast",
    "nnUNetTrainerHalfWidthBN",
    "nnUNetTrainerImplicitLite",
    "nnUNetTrainerImplicitLiteDistilled",
    "nnUNetTrainerInvertibleNoVAE",
    "nnUNetTrainerMeCascadeCheckpointing",
    "nnUNetTrainerMeCascadeOnePass",
    "nnUNetTrainerMeCheckpointing",
    "nnUNetTrainerMeUNetOnePass",
    "nnUNetTrainerPartiallyInvertibleNoVAE",
}


def slow_variants(names: Iterable[str]) -> list[Any]:
    """Parameters of a test; those of variants are slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else []) for name in names]
