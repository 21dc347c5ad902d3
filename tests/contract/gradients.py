"""Gradients of a trainer's step, as its optimiser would take them."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn


class Recorder:
    """Stands for the optimiser: keeps the gradients of each step."""

    def __init__(self, network: nn.Module) -> None:
        self.parameters = list(network.parameters())
        self.taken: dict[int, Tensor] = {}

    def register_step_pre_hook(self, hook: Any) -> None:
        """Nobody looks at these steps."""

    def zero_grad(self, set_to_none: bool) -> None:
        assert set_to_none
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                assert index not in self.taken, "two steps of one parameter"
                self.taken[index] = parameter.grad.clone()


def gradients_of(trainer: Any, batch: dict[str, Any], clip: bool = False) -> list[Tensor | None]:
    """Gradients that a step takes, for each parameter of the network; its weights stay as they are."""
    recorder = Recorder(trainer.network)
    with (
        patch.object(trainer, "optimizer", recorder),
        patch.object(torch.nn.utils, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_ if clip else lambda *_: None),
    ):
        trainer.train_step(batch)
    return [recorder.taken.get(index) for index in range(len(recorder.parameters))]
