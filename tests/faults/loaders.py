"""An augmentation process is killed, as the system does when memory runs out."""

from __future__ import annotations

from typing import Any

from tests.faults.bench import Bench, note_end
from tests.faults.outcome import Outcome
from tests.faults.training import Training
from tests.faults.triggers import OtherProcess

TRAINER = "nnUNetTrainer_8epochs_1iters"
_ENDS = 60.0  # seconds in which a training has to notice


def loaders(bench: Bench) -> Outcome:
    """Kill one process of training or of validation at a drawn epoch, in one or two ranks."""
    outcome = Outcome()
    for _ in range(1 if bench.is_short else 16):
        _killed(bench, outcome, workers=2)
    for _ in range(0 if bench.is_short else 4):
        _killed(bench, outcome, workers=1, ranks=2)
    return outcome


def _killed(bench: Bench, outcome: Outcome, **options: Any) -> None:
    epoch, of_training = 1 + bench.draw.randrange(4), bench.draw.random() < 0.7
    kind = f"process of {'training' if of_training else 'validation'} killed" + " of two ranks" * ("ranks" in options)

    def choose(trainer: Any) -> int:
        loader = trainer.dataloader_train if of_training else trainer.dataloader_val
        return int(loader._processes[0].pid)

    training: Training = bench.training(TRAINER, trigger=OtherProcess(epoch, choose), **options)
    ended = bench.run(training, _ENDS)
    fault = f"{kind} in epoch {epoch}"
    if ended.status == 0:  # what it had prepared was enough
        outcome.observed[f"{kind}: nobody needed it any more"] += 1
        bench.tidy(training)
        return
    outcome.injected[kind] += 1
    note_end(ended, outcome, fault)
    if "augmentation process" not in ended.text or "--c" not in ended.text:
        outcome.problem("unclear", f"{fault}: {ended.last_line}")
    bench.finish(training, outcome, fault, is_repeatable=False)
    bench.tidy(training)
