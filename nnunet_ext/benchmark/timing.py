"""Training steps and forward passes of real networks, one turn each, interleaved between networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ext.benchmark.machine import Machine
from nnunet_ext.benchmark.memory import surrogate_loss, training_outputs

Work = Callable[[], None]


class TrainingStep:
    """What nnU-Net's trainer does with a batch, with a surrogate for the loss: forward, backward, clip, SGD.

    The learning rate is 0: the operations are the same, but weights and so all repeats stay the same.

    Args:
        network: in training mode, on the device.
        machine: decides on autocast.
    """

    def __init__(self, network: nn.Module, machine: Machine) -> None:
        self._network = network
        self._machine = machine
        self._parameters = list(network.parameters())
        self._optimizer = torch.optim.SGD(
            self._parameters, lr=0.0, weight_decay=3e-5, momentum=0.99, nesterov=True
        )

    def forward(self, x: Tensor) -> Any:
        """(B, C, *patch) -> logits, with deep supervision a list of them."""
        with self._machine.autocast():
            return training_outputs(self._network, x)

    def finish(self, outputs: Tensor | list[Tensor]) -> None:
        """Loss, backward, clipping and step; leaves no gradients."""
        with self._machine.autocast():
            loss = surrogate_loss(outputs)
        del outputs
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 12)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def training(network: nn.Module, x: Tensor, machine: Machine) -> Work:
    """Return what runs one training step; x (B, C, *patch)."""
    step = TrainingStep(network, machine)
    return lambda: step.finish(step.forward(x))


def inference(network: nn.Module, x: Tensor, machine: Machine) -> Work:
    """Return what predicts one patch; x (1, C, *patch)."""

    def run() -> None:
        with torch.inference_mode(), machine.autocast():
            network(x)

    return run


class Subject:
    """A network that takes its turns on the device and waits in the host's memory between them.

    Args:
        build: returns the network, in the mode that it runs in; called before the first turn.
        prepare: `training` or `inference`.
        shape: (B, C, *patch) of the input.
        needed: bytes of a turn, parameters included.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        prepare: Callable[[nn.Module, Tensor, Machine], Work],
        shape: Sequence[int],
        needed: int,
    ) -> None:
        self._build = build
        self._prepare = prepare
        self._shape = shape
        self._needed = needed
        self._network: nn.Module | None = None

    def turn(self, machine: Machine, clock: Callable[[], float]) -> float:
        """Run once on the device; return the seconds.

        Raises:
            DoesNotFitError: there is no room for it on the CPU.
        """
        machine.require(self._needed)
        self._network = self._network or self._build()
        try:
            network = self._network.to(machine.kind)
            work = self._prepare(network, torch.randn(*self._shape, device=machine.kind), machine)
            if machine.is_cuda:  # fills the allocator's cache, which the network before has left empty
                work()
            machine.synchronize()
            start = clock()
            work()
            machine.synchronize()
            return clock() - start
        finally:
            self._network.zero_grad(set_to_none=True)
            self._network.to("cpu")


@dataclass(frozen=True)
class Timed:
    """Seconds of every repeat, and the error that ended a subject's turns."""

    seconds: Mapping[tuple[str, str], Sequence[float]]
    errors: Mapping[tuple[str, str], Exception]


def interleave(
    subjects: Mapping[tuple[str, str], Subject],
    repeats: int,
    machine: Machine,
    on_round: Callable[[str, str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> Timed:
    """Give every subject one turn, then every subject the next; the first round warms up and isn't counted.

    Args:
        subjects: (trainer, quantity) -> subject, in the order of their turns.
        repeats: rounds that count.
        machine: where they run.
        on_round: called with the key before each turn.
        clock: seconds.
    """
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in subjects}
    errors: dict[tuple[str, str], Exception] = {}
    for number in range(repeats + 1):
        for key, subject in subjects.items():
            on_round(*key)
            if key in errors:
                continue
            try:
                elapsed = subject.turn(machine, clock)
            except Exception as error:  # of any method: a result that leaves the others
                errors[key] = error.with_traceback(None)  # which would keep the tensors of the turn
            else:
                seconds[key] += [elapsed] * (number > 0)
            machine.release()
    return Timed(seconds, errors)
