"""Finds the largest patch, then the largest batch, whose training fits a GPU, with few measurements.

The memory of a step is nearly proportional to the voxels of a batch, plus a part that depends on the weights. So each
measurement predicts all candidates near it, the best of them is measured next, and only a measured one is chosen.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import log
from typing import Any

from nnunet_ext.memory.count import CONTEXT_BYTES, FRAGMENTED_SHARE, TrainingMemory

FILLED = 0.9  # share of the target that a plan fills, unless image or data set are the limit
MARGIN = 0.005  # between a prediction and the limits: nearer to one, the measurement is often beyond it
GRADIENTS_AT_PEAK = 0.5  # share of the gradients that is there when the activations are the most
MOST_MEASUREMENTS = 16  # after the first


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A patch with its topology.

    Args:
        plan: The configuration, without batch size.
        key: What tells it from others.
        worth: What is to be as large as possible.
        voxels: What memory is about proportional to.
        weights: Number of weights, relative to other candidates.
        covers_image: Whether the patch covers a typical image.
        most: Largest batch that is allowed.
        bound: What allows no more, a limit of the plans.
    """

    plan: dict[str, Any]
    key: str
    worth: float
    voxels: float
    weights: float
    covers_image: bool
    most: int
    bound: str = "data set"


@dataclass(frozen=True)
class Choice:
    """A candidate, its batch and the memory that was measured."""

    candidate: Candidate
    batch: int
    memory: TrainingMemory

    @property
    def voxels(self) -> float:
        """Of a batch."""
        return self.batch * self.candidate.voxels

    @property
    def growing(self) -> float:
        """Bytes that depend on the voxels."""
        return self.memory.expected - _fixed(self.memory)


@dataclass(kw_only=True)
class MemorySearch:
    """The search of one configuration; `known` may hold measurements of others with the same network.

    Args:
        target: Bytes of the GPU.
        least: Smallest batch.
        guess: Voxels of a batch that is measured first, where nothing is known.
        measure: Memory of a candidate at a batch.
        known: Measurements, added to.
    """

    target: int
    least: int
    guess: float
    measure: Callable[[Candidate, int], TrainingMemory]
    known: dict[tuple[str, int], Choice] = field(default_factory=dict)

    def run(self, candidates: Sequence[Candidate]) -> Choice | None:
        """Choose; None where no candidate fits."""
        ordered = sorted(candidates, key=lambda c: c.worth, reverse=True)
        if not self.known:
            first = min(ordered, key=lambda c: abs(log(self.least * c.voxels / self.guess)))
            self._measure(first, self.least)
        for _ in range(MOST_MEASUREMENTS):
            candidate, batch = self.predicted(ordered) or (ordered[-1], self.least)
            known = self.known.get((candidate.key, batch))
            if known is not None:
                return replace(known, candidate=candidate) if known.memory.expected <= self.target else None
            self._measure(candidate, batch)
        return self._best_known(ordered)

    def predicted(self, ordered: Sequence[Candidate]) -> tuple[Candidate, int] | None:
        """The first candidate that fills the target or covers the image; else the one that fills it most."""
        fullest: tuple[float, tuple[Candidate, int] | None] = (0.0, None)
        for candidate in ordered:
            batch = self._largest_batch(candidate)
            if batch < self.least:
                continue
            share = self._expected(candidate, batch) / self.target
            if share >= FILLED + self._margin(candidate, batch) or candidate.covers_image:
                return candidate, batch
            if share > fullest[0]:
                fullest = share, (candidate, batch)
        return fullest[1]

    def _largest_batch(self, candidate: Candidate) -> int:
        """The largest batch that is expected to fit; less than the smallest where none does."""
        batches = range(self.least, candidate.most + 1)
        return self.least - 1 + bisect_left(batches, True, key=lambda batch: not self._fits(candidate, batch))

    def _fits(self, candidate: Candidate, batch: int) -> bool:
        return self._expected(candidate, batch) <= self.target * (1 - self._margin(candidate, batch))

    def _margin(self, candidate: Candidate, batch: int) -> float:
        return 0.0 if (candidate.key, batch) in self.known else MARGIN

    def _expected(self, candidate: Candidate, batch: int) -> float:
        """Bytes as measured, or as the measurement of the most similar number of voxels and of samples lets expect.

        What depends on the voxels lies on the line through that measurement and the furthest one of its batch or patch;
        with no other, or where the line falls, it is in proportion to them.
        """
        known = self.known.get((candidate.key, batch))
        if known is not None:
            return known.memory.expected
        voxels = batch * candidate.voxels
        near, *others = sorted(
            self.known.values(), key=lambda choice: abs(log(choice.voxels / voxels)) + abs(log(choice.batch / batch))
        )
        akin = [o for o in others if o.batch == near.batch or o.candidate.key == near.candidate.key]
        slope = near.growing / near.voxels
        if akin and (distance := near.voxels - akin[-1].voxels):
            line = (near.growing - akin[-1].growing) / distance
            slope = line if line > 0 else slope
        weights = candidate.weights / near.candidate.weights
        always = CONTEXT_BYTES + weights * (_fixed(near.memory) - CONTEXT_BYTES)
        return always + near.growing + slope * (voxels - near.voxels)

    def _measure(self, candidate: Candidate, batch: int) -> None:
        self.known[candidate.key, batch] = Choice(candidate, batch, self.measure(candidate, batch))

    def _best_known(self, ordered: Sequence[Candidate]) -> Choice | None:
        mine = {c.key: c for c in ordered}
        fitting = [
            replace(choice, candidate=mine[key])
            for (key, batch), choice in self.known.items()
            if key in mine and choice.memory.expected <= self.target and self.least <= batch <= mine[key].most
        ]
        filled = [c for c in fitting if c.memory.expected >= FILLED * self.target]
        return max(filled or fitting, key=lambda c: (c.candidate.worth, c.batch), default=None)


def _fixed(memory: TrainingMemory) -> float:
    """Bytes that don't depend on the voxels: context, weights, optimiser; the peak holds at least these."""
    always = memory.parameters + memory.optimizer + GRADIENTS_AT_PEAK * memory.gradients
    return CONTEXT_BYTES + (1 + FRAGMENTED_SHARE) * always
