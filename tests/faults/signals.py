"""SIGTERM, SIGINT, SIGHUP, SIGKILL to a training with augmentation processes, and to one of two ranks."""

from __future__ import annotations

import signal

from tests.faults.bench import Bench, note_end
from tests.faults.outcome import Outcome
from tests.faults.processes import Child, members
from tests.faults.training import Training
from tests.faults.triggers import Slow

TRAINER = "nnUNetTrainer_8epochs_1iters"
_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)


def signals(bench: Bench) -> Outcome:
    """Send each signal at drawn moments."""
    outcome = Outcome()
    rounds = 1 if bench.is_short else 5
    for number in _NUMBERS[: 1 if bench.is_short else None]:
        for _ in range(rounds):
            _signalled(bench, number, outcome, workers=2)
        if not bench.is_short:
            for _ in range(2):
                _signalled(bench, number, outcome, ranks=2, workers=1)
    return outcome


def _signalled(bench: Bench, number: signal.Signals, outcome: Outcome, ranks: int = 1, workers: int = 0) -> None:
    delay = 0.3 * bench.draw.random()
    kind = f"{number.name} to {'the process that started two ranks' if ranks > 1 else 'a training with workers'}"
    fault = f"{kind} after {delay:.3f} s"
    training = bench.training(TRAINER, ranks=ranks, workers=workers, trigger=Slow(2))
    child = Child(training, bench.log())
    child.wait(60, lambda: _has_saved(training))
    child.wait(delay)
    there = len(members(child.process))
    child.kill(number)
    ended = child.end(60)
    outcome.injected[kind] += 1
    if there < 1 + ranks * workers:
        outcome.observed["training without its workers when the signal came"] += 1
    if ended.status == 0:
        outcome.problem("unclear", f"{fault}: exit status 0")
    note_end(ended, outcome, fault)
    outcome.observed[f"{kind}: status {ended.status}"] += 1
    bench.finish(training, outcome, fault, is_repeatable=False)
    bench.tidy(training)


def _has_saved(training: Training) -> bool:
    return any("saved" in note for note in training.told())
