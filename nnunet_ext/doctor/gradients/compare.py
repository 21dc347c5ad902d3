"""How far gradients are from those of plain autograd, and how far they may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nnunet_ext.doctor.gradients.step import Gradients

# An inversion in float64 loses up to four of 16 digits; a wrong term shows in the first.
DOUBLE_LIMIT = 1e-9
# The same in float32: up to four of seven, and convolutions that sum in another order.
SINGLE_LIMIT = 1e-2
# Under autocast a gradient may be as far from plain autograd's as a few times what low precision itself does to it.
MIXED_TIMES, MIXED_LIMIT = 4.0, 0.1
MIXED_MOST = 0.4  # a gradient of half the size is off by 0.5
# Of the root mean square over all gradients: smaller ones, as of a bias before a norm, are rounding in low precision.
_FLOORS = {"double": 1e-3, "single": 1e-2, "mixed": 0.1}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The gradient that is furthest from where it should be.

    Args:
        name: Of the parameter, or "input".
        value: Relative distance.
        limit: Largest that is allowed.
    """

    name: str
    value: float
    limit: float

    @property
    def is_wrong(self) -> bool:
        """Whether it is too large, or no number."""
        return not self.value <= self.limit


def in_double(names: Sequence[str], found: Gradients, plain: Gradients) -> Difference:
    """Compare gradients in float64."""
    return _furthest(names, distances(found, plain, _FLOORS["double"]), [DOUBLE_LIMIT] * len(found))


def in_single(names: Sequence[str], found: Gradients, plain: Gradients) -> Difference:
    """Compare gradients in float32."""
    return _furthest(names, distances(found, plain, _FLOORS["single"]), [SINGLE_LIMIT] * len(found))


def in_mixed(names: Sequence[str], found: Gradients, plain: Gradients, precise: Gradients) -> Difference:
    """Compare gradients under autocast.

    Args:
        names: Of the parameters, then "input".
        found: Gradients of the step.
        plain: Those of plain autograd under the same autocast.
        precise: Those of plain autograd in float32.
    """
    noise = distances(plain, precise, _FLOORS["mixed"])
    limits = [min(MIXED_TIMES * value + MIXED_LIMIT, MIXED_MOST) for value in noise]
    return _furthest(names, distances(found, plain, _FLOORS["mixed"]), limits)


def distances(found: Gradients, wanted: Gradients, floor: float) -> list[float]:
    """Relative distance of each gradient; infinite where only one of both is there, or a number is none.

    Args:
        found, wanted: Gradients; None is as good as zeros, which compiled steps have for outputs that are not used.
        floor: Share of the root mean square over all of `wanted` that each is at least compared with.
    """
    there = [gradient for gradient in wanted if gradient is not None]
    count = sum(gradient.numel() for gradient in there)
    mean = math.sqrt(sum(float(gradient.square().sum()) for gradient in there) / max(1, count))
    return [_distance(mine, theirs, floor * mean) for mine, theirs in zip(found, wanted, strict=True)]


def _distance(mine: Tensor | None, theirs: Tensor | None, least: float) -> float:
    if mine is None or theirs is None:
        there = mine if theirs is None else theirs
        return math.inf if there is not None and there.any() else 0.0
    value = float((mine - theirs).norm()) / max(float(theirs.norm()), least * math.sqrt(theirs.numel()), 1e-300)
    return value if math.isfinite(value) else math.inf


def _furthest(names: Sequence[str], values: Sequence[float], limits: Sequence[float]) -> Difference:
    number = max(range(len(values)), key=lambda i: values[i] / limits[i])
    return Difference(name=names[number], value=values[number], limit=limits[number])
