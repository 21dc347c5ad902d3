"""Turns of networks: their order, what is counted, and what an error of one leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from nnunet_ext.benchmark.machine import DoesNotFitError, Machine, gigabytes, is_out_of_memory
from nnunet_ext.benchmark.measure import WARM_UP_STEPS, Subject, TrainingStep, inference, interleave, training
from nnunet_ext.errors import UsageError
from nnunet_ext.memory.autocast import CudaAutocast
from nnunet_ext.memory.tracker import GIB


class FakeSubject:
    """Takes a number of seconds per turn; raises in the turn of an exception."""

    def __init__(self, *seconds: float | Exception) -> None:
        self._seconds = iter(seconds)

    def turn(self, machine: Machine, clock: Callable[[], float]) -> float:
        value = next(self._seconds)
        if isinstance(value, Exception):
            raise value
        return value


def rounds(subjects: dict[tuple[str, str], Any], repeats: int) -> tuple[Any, list[str]]:
    turns: list[str] = []
    machine = Machine("cpu", "float32")
    timed = interleave(subjects, repeats, machine, lambda name, what: turns.append(name + what))
    return timed, turns


def test_every_subject_has_one_turn_per_round_and_the_first_round_does_not_count() -> None:
    subjects = {("a", "1"): FakeSubject(9, 1, 2), ("a", "2"): FakeSubject(9, 3, 4), ("b", "1"): FakeSubject(9, 5, 6)}
    timed, turns = rounds(subjects, 2)
    assert turns == ["a1", "a2", "b1"] * 3
    assert timed.seconds == {("a", "1"): [1, 2], ("a", "2"): [3, 4], ("b", "1"): [5, 6]}
    assert not timed.errors


@pytest.mark.parametrize("turn", [0, 1])
def test_error_of_one_ends_its_turns_only(turn: int) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    failing = FakeSubject(*[1.0] * turn, error)
    timed, _ = rounds({("a", ""): failing, ("b", ""): FakeSubject(9, 5, 6)}, 2)
    assert timed.errors == {("a", ""): error}
    assert error.__traceback__ is None
    assert timed.seconds["b", ""] == [5, 6]


def test_turn_is_timed_between_two_readings_of_the_clock(machine: Machine) -> None:
    events: list[str] = []

    def prepare(network: nn.Module, x: Tensor, machine: Machine) -> Callable[[], None]:
        events.append(f"prepare {tuple(x.shape)}")
        return lambda: events.append("work")

    def clock() -> float:
        events.append("clock")
        return float(len(events))

    built: list[nn.Module] = []

    def build() -> nn.Module:
        built.append(nn.Conv2d(1, 1, 1))
        return built[-1]

    subject = Subject(build, prepare, (2, 1, 4, 4), 0)
    assert subject.turn(machine, clock) == 2.0
    assert events == ["prepare (2, 1, 4, 4)", "clock", "work", "clock"]
    subject.turn(machine, clock)
    assert len(built) == 1


class PassesForGpu(Machine):
    """The CPU that passes for a GPU, in float16 with a gradient scaler."""

    is_cuda = True

    def synchronize(self) -> None:
        """Nothing is asynchronous."""

    def autocast(self) -> Any:
        return torch.autocast("cpu", dtype=torch.float16, enabled=self.precision == "mixed")


@pytest.mark.parametrize(("duration", "steps"), [(2.0, 3), (0.11, 5), (0.011, 46)])
def test_turn_on_a_gpu_warms_up_and_takes_several_steps(duration: float, steps: int) -> None:
    now, works = [0.0], [0]

    def work() -> None:
        works[0] += 1
        now[0] += duration * (10 if works[0] == 1 else 1)  # the first is slow

    subject = Subject(lambda: nn.Conv2d(1, 1, 1), lambda network, x, machine: work, (2, 1, 4, 4), 0)
    assert subject.turn(PassesForGpu("cpu", "mixed"), lambda: now[0]) == pytest.approx(duration)
    assert works[0] == WARM_UP_STEPS + steps


def test_gradients_of_a_step_are_normal_numbers_of_float16_as_those_of_cross_entropy() -> None:
    network, x = nn.Conv2d(1, 3, 1), torch.randn(2, 1, 512, 512)
    seen: list[Tensor] = []

    def watch(module: nn.Module, given: Any, result: Tensor) -> None:
        result.register_hook(lambda gradient: seen.append(gradient.detach().float()))

    network.register_forward_hook(watch)
    machine = PassesForGpu("cpu", "mixed")
    with CudaAutocast():
        training(network, x, machine)()
    with machine.autocast():
        logits = network(x).float()  # as CUDA's autocast does
    loss = nn.functional.cross_entropy(logits, torch.randint(3, (2, 512, 512)))
    torch.amp.GradScaler("cpu").scale(loss).backward()
    ours, theirs = (gradient.abs().mean() for gradient in seen)
    assert ours > torch.finfo(torch.float16).smallest_normal
    assert 0.5 < ours / theirs < 2


@pytest.mark.parametrize("precision", ["mixed", "float32"])
def test_only_float16_on_a_gpu_is_scaled(precision: Any) -> None:
    assert PassesForGpu("cpu", precision).gradient_scaler().is_enabled() is (precision == "mixed")
    assert not Machine("cpu", precision).gradient_scaler().is_enabled()


def test_training_step_computes_gradients_and_leaves_weights_and_no_gradients(machine: Machine) -> None:
    network = nn.Conv2d(1, 3, 3)
    before = network.weight.detach().clone()
    seen: list[float] = []
    network.weight.register_hook(lambda gradient: seen.append(gradient.norm().item()))
    training(network, torch.randn(2, 1, 8, 8), machine)()
    assert len(seen) == 1
    assert seen[0] > 0
    torch.testing.assert_close(network.weight.detach(), before, rtol=0, atol=0)
    assert network.weight.grad is None


def test_training_step_has_the_optimiser_of_nnunet(machine: Machine) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    network = nn.Conv2d(1, 3, 3)
    trainer = nnUNetTrainer.__new__(nnUNetTrainer)
    trainer.network, trainer.initial_lr, trainer.weight_decay, trainer.num_epochs = network, 1e-2, 3e-5, 10
    theirs = trainer.configure_optimizers()[0]
    ours = TrainingStep(network, machine)._optimizer
    assert type(ours) is type(theirs)
    for key in ("momentum", "nesterov", "weight_decay"):
        assert ours.defaults[key] == theirs.defaults[key]


class Dtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.seen: list[tuple[torch.dtype, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.seen.append((y.dtype, torch.is_inference_mode_enabled()))
        return y


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("mixed", torch.bfloat16)])
def test_precision_is_that_of_the_machine(precision: Any, dtype: torch.dtype) -> None:
    machine, network, x = Machine("cpu", precision), Dtypes(), torch.randn(1, 1, 8, 8)
    training(network, x, machine)()
    inference(network, x, machine)()
    assert network.seen == [(dtype, False), (dtype, True)]


def test_subject_without_room_is_refused_before_it_is_built(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 3 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", Memory)

    def build() -> nn.Module:
        raise AssertionError("built")

    subject = Subject(build, training, (1, 1, 8, 8), int(4.5 * GIB))
    with pytest.raises(DoesNotFitError, match=r"^does not fit in 3\.0 GB: needs 4\.5 GB$"):
        subject.turn(machine, lambda: 0.0)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (MemoryError(), True),
        (DoesNotFitError("x"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_allocator_of_the_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    ("available", "kind", "precision", "expected"),
    [
        (True, None, None, ("cuda", "mixed")),
        (True, "cpu", None, ("cpu", "float32")),
        (True, "cuda", "float32", ("cuda", "float32")),
        (False, None, None, ("cpu", "float32")),
        (False, "cpu", "mixed", ("cpu", "mixed")),
    ],
)
def test_defaults_of_device_and_precision(
    available: bool, kind: Any, precision: Any, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    machine = Machine.find(kind, precision)
    assert (machine.kind, machine.precision) == expected


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"--device cuda needs an NVIDIA GPU, .* or use --device cpu"):
        Machine.find("cuda", None)


def test_bytes_are_shown_in_gigabytes() -> None:
    assert gigabytes(1.25 * GIB) == "1.2 GB"
