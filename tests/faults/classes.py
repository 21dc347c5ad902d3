"""The classes of faults: a function each, which injects them on a bench and returns what they came to."""

from __future__ import annotations

from collections.abc import Callable

from tests.faults.bench import Bench
from tests.faults.corruption import corruption
from tests.faults.disk import disk
from tests.faults.kills import kills, registered
from tests.faults.loaders import loaders
from tests.faults.non_finite import non_finite
from tests.faults.outcome import Outcome
from tests.faults.signals import signals

CLASSES: dict[str, Callable[[Bench], Outcome]] = {
    "killed while training and saving": kills,
    "ended by a signal": signals,
    "augmentation process killed": loaders,
    "disk full": disk,
    "checkpoint damaged": corruption,
    "NaN or infinity": non_finite,
    "registered trainers killed": registered,
}
LONG = ("registered trainers killed",)  # not in the short suite
