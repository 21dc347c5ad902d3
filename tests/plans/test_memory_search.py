"""The search, on memory that a formula gives instead of a network."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import prod

import pytest

from nnunet_ext.memory.count import CONTEXT_BYTES, FRAGMENTED_SHARE, TrainingMemory
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.plans.memory_search import FILLED, Candidate, Choice, MemorySearch
from nnunet_ext.plans.patch_shapes import patch_shapes

Formula = Callable[[int, int], float]  # voxels of the patch, batch -> bytes


@cache
def candidates(image: int = 400, most: int = 10**6) -> list[Candidate]:
    shapes = patch_shapes((1.0,) * 3, (float(image),) * 3)
    return [
        Candidate(
            plan={},
            key=str(s),
            worth=prod(s) / d**0.5,
            voxels=prod(s),
            weights=1.0,
            covers_image=min(s) >= image,
            most=most,
        )
        for s, d in shapes.items()
    ]


def search(target: float, formula: Formula, known: dict | None = None) -> tuple[MemorySearch, list[int]]:
    counted: list[int] = []

    def measure(candidate: Candidate, batch: int) -> TrainingMemory:
        counted.append(batch)
        weights = GIB // 10
        return TrainingMemory(
            parameters=weights,
            gradients=weights,
            optimizer=weights,
            held=0,
            peak=round(formula(candidate.voxels, batch)),
            workspace=0,
        )

    return MemorySearch(
        target=round(target * GIB), least=2, guess=2 * 128**3, measure=measure, known=known if known is not None else {}
    ), counted


def plain(voxels: int, batch: int) -> float:
    return 0.4 * GIB + 1200 * voxels * batch


@pytest.mark.parametrize("target", [4, 8, 11, 24, 80])
def test_the_largest_patch_that_fills_the_target_is_found_with_few_measurements(target: float) -> None:
    found, counted = search(target, plain)
    choice = found.run(candidates())
    assert choice is not None
    assert FILLED * target * GIB <= choice.memory.expected <= target * GIB
    assert choice.batch == 2
    assert len(counted) <= 4
    fitting = [c for c in candidates() if 1.05 * plain(c.voxels, 2) + GIB // 2 <= 0.99 * target * GIB]
    assert choice.candidate.worth >= 0.98 * max(c.worth for c in fitting)


def test_the_whole_image_gets_a_larger_batch() -> None:
    choice = search(8, plain)[0].run(candidates(48))
    assert choice is not None
    assert choice.candidate.covers_image
    assert choice.batch > 20
    assert choice.memory.expected >= FILLED * 8 * GIB


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


def formula_of(kind: str, seed: int) -> tuple[Formula, float, int]:
    """Memory of a random step, a target, and the size of the images."""
    rng = random.Random(seed)
    per_voxel, fixed = rng.uniform(200, 3000), rng.uniform(0.1, 0.8) * GIB
    per_sample, kink = rng.uniform(0, 0.4) * GIB, rng.uniform(0.5, 1.5)
    spread = {"noise": 0.03, "holes": 1.0}.get(kind, 0.0)

    def formula(voxels: int, batch: int) -> float:
        grown = per_voxel * voxels * batch
        if kind == "kink":
            grown = per_sample * batch + max(grown, kink * grown - 0.2 * GIB)
        if kind == "steps":
            grown = round(grown / (0.05 * GIB)) * 0.05 * GIB
        return fixed + grown * (1 + spread * random.Random(f"{seed} {voxels} {batch}").random())

    return formula, rng.uniform(4, 80), rng.choice([60, 150, 400])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("kind", "most"), [("straight", 3), ("kink", 3), ("steps", 3), ("noise", 8)])
def test_the_target_is_filled_with_few_measurements_whatever_grows(kind: str, most: int, seed: int) -> None:
    formula, target, image = formula_of(kind, seed)
    found, counted = search(target, formula)
    choice = found.run(candidates(image))
    assert choice is not None
    assert choice.memory.expected <= target * GIB
    assert choice.memory.expected >= FILLED * target * GIB or choice.candidate.covers_image
    assert len(counted) <= most


@pytest.mark.parametrize("seed", range(6))
def test_what_no_measurement_predicts_still_fits(seed: int) -> None:
    formula, target, image = formula_of("holes", seed)
    choice = search(target, formula)[0].run(candidates(image))
    assert choice is not None
    assert round(formula(round(choice.candidate.voxels), choice.batch)) == choice.memory.peak
    assert choice.memory.expected <= target * GIB


@pytest.mark.parametrize("target", [8, 11, 16])
def test_samples_that_are_recomputed_apart_leave_the_patch_as_large_as_it_fits(target: float) -> None:
    """A further sample costs less than the same voxels in the patch."""

    def apart(voxels: int, batch: int) -> float:
        return 0.2 * GIB + voxels * (190 * batch + 440)

    found, counted = search(target, apart)
    choice = found.run(candidates())
    assert choice is not None
    filling = [c.worth for c in candidates() if 0.91 <= (1.05 * apart(c.voxels, 2) / GIB + 0.5) / target <= 0.99]
    assert choice.candidate.worth >= max(filling)
    assert FILLED * target * GIB <= choice.memory.expected <= target * GIB
    assert len(counted) <= 6


@pytest.mark.parametrize("target", [4, 5, 11, 24])
def test_the_second_measurement_tells_what_does_not_grow(target: float) -> None:
    found, counted = search(target, lambda voxels, batch: 3 * GIB + 1000 * voxels * batch)
    choice = found.run(candidates())
    assert choice is not None
    assert FILLED * target * GIB <= choice.memory.expected <= target * GIB
    assert len(counted) <= 3


def test_the_search_gives_up_after_seventeen_measurements() -> None:
    found, counted = search(8, lambda voxels, batch: 8 * GIB)  # smaller patches never help
    assert found.run(candidates()) is None
    assert len(counted) == 17


@pytest.mark.parametrize(
    ("held", "part", "size", "target"),
    [(363, 218, 2.5e6, 8), (326, 820, 2.5e6, 16), (189, 210, 8e6, 4), (69, 541, 8e6, 24), (216, 290, 1e6, 11)],
)
def test_groups_of_samples_that_are_recomputed_leave_the_target_filled(
    held: float, part: float, size: float, target: float
) -> None:
    """Part of the memory is there for one sample at a time, or for as many small ones as fill a group."""

    def groups(voxels: int, batch: int) -> float:
        return 0.2 * GIB + voxels * (held * batch + part * min(batch, max(1, size // voxels)))

    found, counted = search(target, groups)
    choice = found.run(candidates())
    assert choice is not None
    assert choice.memory.expected <= target * GIB
    assert choice.memory.expected >= FILLED * target * GIB or choice.candidate.covers_image
    assert len(counted) <= 9


TARGET = 10 * GIB
HALF = TrainingMemory(
    parameters=10**8, gradients=10**8, optimizer=10**8, held=0, peak=0, workspace=0
)  # of a network of one unit of weights


def predicted(measured: float, *others: tuple[float, float]) -> str | None:
    """Key of what a search takes next that has measured "0", of batch 1, at a share of the target.

    Args:
        measured: Share of the target.
        others: Voxels and weights of candidates "1", "2", ..., in relation to those of "0", in the order of worth.
    """
    total = measured * TARGET
    peak = round((total - CONTEXT_BYTES) / (1 + FRAGMENTED_SHARE))
    zero, *rest = (
        Candidate(plan={}, key=str(i), worth=-i, voxels=1e6 * voxels, weights=weights, covers_image=False, most=1)
        for i, (voxels, weights) in enumerate([(1.0, 1.0), *others])
    )
    known = {("0", 1): Choice(zero, 1, replace(HALF, peak=peak))}
    found = MemorySearch(
        target=TARGET, least=1, guess=1e6, measure=lambda candidate, batch: HALF, known=known
    ).predicted([*rest, zero])
    return found[0].key if found else None


def share_of(voxels: float, weights: float, of: float) -> float:
    """Share of the target of a step whose measured neighbour has the share `of`, by the docstring's rule."""
    always = (1 + FRAGMENTED_SHARE) * 2.5e8
    growing = of * TARGET - CONTEXT_BYTES - always
    return (CONTEXT_BYTES + weights * always + voxels * growing) / TARGET


@pytest.mark.parametrize(("share", "chosen"), [(0.901, "0"), (0.899, "1")])
def test_the_largest_patch_that_fills_nine_tenths_is_preferred_to_a_fuller_one(share: float, chosen: str) -> None:
    fuller = 1.05
    found = MemorySearch(target=TARGET, least=1, guess=1e6, measure=lambda candidate, batch: HALF)
    for i, (voxels, filled) in enumerate([(1.0, share), (fuller, 0.95)]):
        candidate = Candidate(
            plan={}, key=str(i), worth=-i, voxels=1e6 * voxels, weights=1.0, covers_image=False, most=1
        )
        peak = round((filled * TARGET - CONTEXT_BYTES) / (1 + FRAGMENTED_SHARE))
        found.known[str(i), 1] = Choice(candidate, 1, replace(HALF, peak=peak))
    choice = found.run([known.candidate for known in found.known.values()])
    assert choice is not None
    assert choice.candidate.key == chosen


@pytest.mark.parametrize(("share", "chosen"), [(0.904, "0"), (0.906, "1"), (0.994, "1"), (0.996, "0")])
def test_a_prediction_within_half_a_percent_of_a_limit_is_not_trusted(share: float, chosen: str) -> None:
    measured = 0.95
    fixed = share_of(0.0, 1.0, measured)
    voxels = (share - fixed) / (measured - fixed)
    assert share_of(voxels, 1.0, measured) == pytest.approx(share)
    assert predicted(measured, (voxels, 1.0)) == chosen


@pytest.mark.parametrize(("difference", "chosen"), [(-0.002, "1"), (0.002, "0")])
def test_the_weights_of_another_network_count_with_half_of_their_gradients(difference: float, chosen: str) -> None:
    """A network of ten times the weights fills the target up to the margin, or a little more."""
    measured, weights = 0.95, 10.0
    voxels = (0.995 + difference - share_of(0.0, weights, measured)) / (
        share_of(1.0, weights, measured) - share_of(0.0, weights, measured)
    )
    assert predicted(measured, (voxels, weights)) == chosen
