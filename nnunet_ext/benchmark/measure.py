"""Training steps and forward passes of real networks, in turns that are interleaved between networks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ext.benchmark.machine import Machine
from nnunet_ext.memory.network import surrogate_loss, training_outputs
from nnunet_ext.memory.step import passes_of

STEP, COMPILED, PATCH = "training step", "compiled training step", "inference of a patch"
Work = Callable[[], None]
# Of a turn on a GPU, whose clocks and queue need some steps to settle.
WARM_UP_STEPS = 3
FEWEST_STEPS, FEWEST_SECONDS = 3, 0.5


class TrainingStep:
    """What nnU-Net's trainer does with a batch, with a surrogate for the loss: forward, backward, clip, SGD.

    The gradient of the surrogate is of the size of that of cross-entropy, and scaled as nnU-Net scales in float16,
    which could not hold it otherwise: a mean over 2 x 128^3 voxels gives each logit 2e-7 at most. The learning rate is
    0: the operations are the same, but weights and so all repeats stay the same.

    Args:
        network: Network in training mode, on the device.
        machine: Decides on autocast and gradient scaler.
    """

    def __init__(self, network: nn.Module, machine: Machine) -> None:
        self._network = network
        self._machine = machine
        self._scaler = machine.gradient_scaler()
        self._parameters = list(network.parameters())
        self._optimizer = torch.optim.SGD(self._parameters, lr=0.0, weight_decay=3e-5, momentum=0.99, nesterov=True)

    def forward(self, x: Tensor) -> Any:
        """(B, C, *patch) -> logits, with deep supervision a list of them; of several passes those of the last."""
        following = passes_of(self._network, x)
        part, data = next(following)
        for after in following:
            self._backward(self._outputs(part, data))
            part, data = after
        return self._outputs(part, data)

    def finish(self, outputs: Tensor | list[Tensor]) -> None:
        """Loss, backward, clipping and step; leaves no gradients."""
        self._backward(outputs)
        del outputs
        self._scaler.unscale_(self._optimizer)
        nn.utils.clip_grad_norm_(self._parameters, 12)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)

    def _outputs(self, part: nn.Module, data: Tensor) -> Any:
        with self._machine.autocast():
            return training_outputs(part, data)

    def _backward(self, outputs: Any) -> None:
        with self._machine.autocast():
            loss = surrogate_loss(outputs)
        self._scaler.scale(loss).backward()


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
        build: Returns the network, in the mode that it runs in; called before the first turn.
        prepare: `training` or `inference`.
        shape: (B, C, *patch) of the input.
        needed: Bytes of a turn, parameters included.
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
        """Run once on the CPU; on a GPU warm up, then run for `FEWEST_STEPS` and `FEWEST_SECONDS` at least.

        Returns:
            Seconds of one step or patch.

        Raises:
            DoesNotFitError: there is no room for it on the CPU.
        """
        machine.require(self._needed)
        self._network = self._network or self._build()
        try:
            network = self._network.to(machine.kind)
            work = self._prepare(network, torch.randn(*self._shape, device=machine.kind), machine)
            steps = 1
            if machine.is_cuda:  # the first fills the allocator's cache, which the network before has left empty
                _seconds(work, WARM_UP_STEPS - 1, machine, clock)
                steps = _enough(_seconds(work, 1, machine, clock))
            return _seconds(work, steps, machine, clock) / steps
        finally:
            self._network.zero_grad(set_to_none=True)
            self._network.to("cpu")


def _seconds(work: Work, steps: int, machine: Machine, clock: Callable[[], float]) -> float:
    machine.synchronize()
    start = clock()
    for _ in range(steps):
        work()
    machine.synchronize()
    return clock() - start


def _enough(seconds: float) -> int:
    """Steps of a turn, from the seconds of one."""
    return max(FEWEST_STEPS, math.ceil(FEWEST_SECONDS / max(seconds, 1e-6)))


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
        repeats: Rounds that count.
        machine: Device that they run on.
        on_round: Called with the key before each turn.
        clock: Seconds.
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
