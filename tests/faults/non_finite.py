"""NaN and infinity in an image, a loss or a gradient, with and without the gradient scaler of float16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nnunet_ext.trainers import finite_steps
from tests.faults.bench import Bench, note_end
from tests.faults.outcome import Outcome
from tests.faults.training import digest
from tests.faults.triggers import Trigger

TRAINERS = (
    "nnUNetTrainer",
    "nnUNetTrainerHalfWidthBN",
    "nnUNetTrainerFasterFusionBN",
    "nnUNetTrainerReversible",
    "nnUNetTrainerInvertible",
    "nnUNetTrainerMeUNet",
)
SCHEDULE = "_3epochs_2iters"
_CHANGED = "a step that is not finite has changed weights"
_NUMBERS = (float("nan"), float("inf"), float("-inf"))
Step = Callable[[dict[str, Any]], dict[str, Any]]


class Spoiled(Trigger):
    """Spoils the first step of an epoch.

    Args:
        at: The epoch.
        spoil: Takes trainer, step and batch, and takes the step.
        is_for_good: Whether all later steps are spoiled too.
    """

    def __init__(self, at: int, spoil: Callable[[Any, Step, dict[str, Any]], Any], is_for_good: bool = False) -> None:
        self.at, self.spoil, self.is_for_good = at, spoil, is_for_good

    def epoch(self, trainer: Any) -> None:
        """Spoil it here."""
        if trainer.current_epoch != self.at:
            return
        step = trainer.train_step

        def train_step(batch: dict[str, Any]) -> Any:
            before = _state(trainer)
            result = self.spoil(trainer, step, batch)
            if _state(trainer) != before:
                print(_CHANGED)
            if not self.is_for_good:
                trainer.train_step = step
            return result

        trainer.train_step = train_step


def non_finite(bench: Bench) -> Outcome:
    """Spoil a step of drawn trainers at drawn epochs; it must change nothing, or end the training by a clear error."""
    outcome = Outcome()
    for name, spoil in _SPOILS.items():
        for _ in range(1 if bench.is_short else 8):
            value, at = bench.draw.choice(_NUMBERS), bench.draw.randrange(3)
            trainer = TRAINERS[0] if bench.is_short else bench.draw.choice(TRAINERS)
            fault = f"{name}: {value} in epoch {at} of {trainer}"
            training = bench.training(trainer + SCHEDULE, trigger=Spoiled(at, spoil(value)))
            ended = bench.run(training)
            outcome.injected[name] += 1
            if _CHANGED in ended.text:
                outcome.problem("silently wrong", f"{fault}: {_CHANGED}")
            if "changed nothing" not in ended.text:
                outcome.problem("unclear", f"{fault}: the log does not speak of it")
            bench.check_end(training, ended, outcome, fault, is_repeatable=False)
            bench.tidy(training)
    for name, (sentence, spoil, is_for_good) in _ENDS.items():
        for _ in range(1 if bench.is_short else 4):
            _ending(bench, outcome, name, sentence, Spoiled(bench.draw.randrange(1, 3), spoil, is_for_good))
    return outcome


def _ending(bench: Bench, outcome: Outcome, name: str, sentence: str, trigger: Spoiled) -> None:
    """The training ends by a clear error, and goes on when the cause is gone."""
    trainer = TRAINERS[0] if bench.is_short else bench.draw.choice(TRAINERS)
    fault = f"{name} in epoch {trigger.at} of {trainer}"
    training = bench.training(trainer + SCHEDULE, trigger=trigger)
    ended = bench.run(training)
    outcome.injected[name] += 1
    note_end(ended, outcome, fault)
    if ended.status == 0 or sentence not in ended.last_line or "--c" not in ended.last_line:
        outcome.problem("unclear", f"{fault}: status {ended.status}, {ended.last_line}")
    bench.finish(training, outcome, fault, is_repeatable=False)
    bench.tidy(training)


def _image(value: float) -> Callable[[Any, Step, dict[str, Any]], Any]:
    def spoil(trainer: Any, step: Step, batch: dict[str, Any]) -> Any:
        data = batch["data"].clone()
        data[0, 0, 0, 0, 0] = data[0, 0, 12, 12, 12] = value
        return step({**batch, "data": data})

    return spoil


def _loss(value: float, scaler: bool = False) -> Callable[[Any, Step, dict[str, Any]], Any]:
    def spoil(trainer: Any, step: Step, batch: dict[str, Any]) -> Any:
        head, whole = next(m for m in trainer.network.modules() if isinstance(m, torch.nn.Conv3d)), trainer.grad_scaler
        trainer.grad_scaler = torch.amp.GradScaler("cpu") if scaler else whole
        hook = head.register_forward_hook(lambda _, __, y: y + value)
        try:
            return step(batch)
        finally:
            hook.remove()
            trainer.grad_scaler = whole

    return spoil


def _gradient(value: float) -> Callable[[Any, Step, dict[str, Any]], Any]:
    def spoil(trainer: Any, step: Step, batch: dict[str, Any]) -> Any:
        def changed(gradient: torch.Tensor | None) -> torch.Tensor | None:
            return None if gradient is None else gradient + value  # None: of what a chain does not use

        hooks = [parameter.register_hook(changed) for parameter in trainer.network.parameters()]
        try:
            return step(batch)
        finally:
            for hook in hooks:
                hook.remove()

    return spoil


def _for_good(trainer: Any, step: Step, batch: dict[str, Any]) -> Any:
    finite_steps._PATIENCE = 2  # of this process
    return _loss(float("nan"))(trainer, step, batch)


def _stored(trainer: Any, step: Step, batch: dict[str, Any]) -> Any:
    load = trainer.dataset_class.load_case

    def load_case(self: Any, key: str) -> Any:
        image, *rest = load(self, key)
        image = np.array(image[:])
        image[0, 0, 0, 0] = np.nan
        return image, *rest

    trainer.dataset_class.load_case = load_case  # in this process
    return _image(float("nan"))(trainer, step, batch)


def _state(trainer: Any) -> str:
    return digest(dict(trainer.network.named_parameters()), trainer.optimizer.state_dict())


_SPOILS: dict[str, Callable[[float], Callable[[Any, Step, dict[str, Any]], Any]]] = {
    "image of a batch": _image,
    "activation, loss": _loss,
    "activation, loss under float16's scaler": lambda value: _loss(value, scaler=True),
    "gradient": _gradient,
}
_ENDS = {
    "stored image": ("images must be finite", _stored, False),
    "every loss from an epoch on": ("in a row", _for_good, True),
}
