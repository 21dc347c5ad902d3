"""The search, on memory that a formula gives instead of a network."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import prod

import pytest

from nnunet_ext.memory.count import TrainingMemory
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.plans.memory_search import FILLED, Candidate, MemorySearch
from nnunet_ext.plans.patch_shapes import patch_shapes

Formula = Callable[[int, int], float]  # voxels of the patch, batch -> bytes


def candidates(image: int = 400, most: int = 10**6) -> list[Candidate]:
    shapes = patch_shapes((1.0,) * 3, (float(image),) * 3)
    return [
        Candidate({}, str(s), prod(s) / d**0.5, prod(s), 1.0, min(s) >= image, most)
        for s, d in shapes.items()
    ]


def search(target: float, formula: Formula, known: dict | None = None) -> tuple[MemorySearch, list[int]]:
    counted: list[int] = []

    def measure(candidate: Candidate, batch: int) -> TrainingMemory:
        counted.append(batch)
        weights = GIB // 10
        return TrainingMemory(weights, weights, weights, 0, round(formula(candidate.voxels, batch)), 0)

    return MemorySearch(
        round(target * GIB), 2, 2 * 128**3, measure, known if known is not None else {}
    ), counted


def plain(voxels: int, batch: int) -> float:
    return 0.4 * GIB + 1200 * voxels * batch


@pytest.mark.parametrize("target", [4, 8, 11, 24, 80])
def test_the_largest_patch_that_fills_the_target_is_found_with_few_measurements(target: float) -> None:
    found, counted = search(target, plain)
    choice = found.run(candidates())
    assert choice is not None
    assert FILLED * target * GIB <= choice.memory.total <= target * GIB
    assert choice.batch == 2
    assert len(counted) <= 4
    fitting = [c for c in candidates() if 1.05 * plain(c.voxels, 2) + GIB // 2 <= 0.99 * target * GIB]
    assert choice.candidate.worth >= 0.98 * max(c.worth for c in fitting)


def test_the_whole_image_gets_a_larger_batch() -> None:
    choice = search(8, plain)[0].run(candidates(48))
    assert choice is not None
    assert choice.candidate.covers_image
    assert choice.batch > 20
    assert choice.memory.total >= FILLED * 8 * GIB


def test_the_data_set_limits_the_batch() -> None:
    choice = search(8, plain)[0].run(candidates(48, most=5))
    assert choice is not None
    assert choice.batch == 5


def test_nothing_fits() -> None:
    assert search(0.6, plain)[0].run(candidates()) is None


def test_what_was_measured_before_is_used() -> None:
    known: dict = {}
    first, _ = search(8, plain, known)
    second, counted = search(8, plain, known)
    assert first.run(candidates()) == second.run(candidates())
    assert not counted


@pytest.mark.parametrize("seed", range(30))
def test_never_above_the_target_whatever_grows(seed: int) -> None:
    rng = random.Random(seed)
    per_voxel, per_sample, fixed = (
        rng.uniform(200, 3000),
        rng.uniform(0, 0.4) * GIB,
        rng.uniform(0.1, 0.8) * GIB,
    )
    target, kink = rng.uniform(4, 80), rng.uniform(0.5, 1.5)

    def formula(voxels: int, batch: int) -> float:
        grown = per_voxel * voxels * batch
        return fixed + per_sample * batch + max(grown, kink * grown - 0.2 * GIB)

    choice = search(target, formula)[0].run(candidates(rng.choice([60, 150, 400])))
    assert choice is not None
    assert choice.memory.total <= target * GIB
    assert choice.memory.total >= FILLED * target * GIB or choice.candidate.covers_image
