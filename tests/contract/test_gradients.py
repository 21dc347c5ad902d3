"""Gradients of every registered trainer's step are those of plain autograd, in every case alone.

`nnunet-ext doctor --gradients` compares the same in less than a minute, several cases at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nnunet_ext import registry
from nnunet_ext.architectures.common.kept import everything_kept
from nnunet_ext.doctor.gradients import tiny
from nnunet_ext.doctor.gradients.cases import CASES, COMBINED, DOUBLE
from nnunet_ext.doctor.gradients.gate import Gate, Measured
from nnunet_ext.doctor.gradients.step import Step
from nnunet_ext.doctor.gradients.subjects import Subject, recomputes, subject_of, subjects
from nnunet_ext.nnunet.teacher import VARIABLE as TEACHER
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.protocols import only_predicts
from tests.contract.variants import VARIANTS

TRAINERS = [name for name in registry.names("trainers") if not only_predicts(trainer_class(name))]
SETTINGS = {setting.configuration: setting for setting in tiny.settings()}
BACKENDS = ["aot_eager"]


def parameters(configurations: tuple[str, ...], is_slow: bool = False) -> list[object]:
    return [
        pytest.param(
            name,
            configuration,
            id=f"{name}-{configuration}",
            marks=[pytest.mark.slow] if is_slow or name in VARIANTS or configuration != tiny.PLANE else [],
        )
        for name in TRAINERS
        for configuration in configurations
    ]


ALL = (tiny.PLANE, tiny.VOLUME, tiny.RESIDUAL, tiny.CASCADE)


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(TEACHER, raising=False)
    yield
    torch._dynamo.reset()


def subject(name: str, configuration: str) -> Subject:
    return subject_of(name, SETTINGS[configuration])


def told(measured: Iterator[Measured]) -> dict[str, str]:
    """What is wrong, and by how much."""
    found = [entry for entry in measured if entry.difference.is_wrong]
    return {entry.what: f"{entry.difference.name} {entry.difference.value:.1e}" for entry in found}


@pytest.mark.parametrize(("name", "configuration"), parameters(ALL))
def test_gradients_are_those_of_plain_autograd(name: str, configuration: str) -> None:
    assert told(Gate(subject(name, configuration).source, "cpu").eager(CASES)) == {}


@pytest.mark.parametrize(("name", "configuration"), parameters((tiny.VOLUME, tiny.RESIDUAL, tiny.CASCADE), True))
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_gradients_are_those_of_plain_autograd(name: str, configuration: str, backend: str) -> None:
    found = subject(name, configuration)
    if not recomputes(Step(found.source, DOUBLE, "cpu")):
        pytest.skip("has no backward pass of own making")
    assert told(Gate(found.source, "cpu").compiled(backend, CASES)) == {}


@pytest.mark.parametrize(("name", "configuration"), parameters((tiny.PLANE,)))
def test_reference_recomputes_nothing(name: str, configuration: str) -> None:
    with everything_kept():
        assert not recomputes(Step(subject(name, configuration).source, DOUBLE, "cpu"))


def test_some_steps_recompute_and_each_kind_is_compared_once() -> None:
    found = list(subjects())
    assert all(isinstance(entry, Subject) for entry in found)
    parts = [entry.parts for entry in found if isinstance(entry, Subject)]
    assert len(set(parts)) == len(parts)
    planes = [entry for entry in found if isinstance(entry, Subject) and entry.configuration == tiny.PLANE]
    assert any(recomputes(Step(entry.source, DOUBLE, "cpu")) for entry in planes)
    # What is left out is the same as something that is compared.
    assert {subject(name, tiny.PLANE).parts for name in TRAINERS} <= set(parts)


def test_combined_cases_hold_every_situation() -> None:
    def situations(cases: tuple[object, ...]) -> set[tuple[str, object]]:
        pairs = {(key, value) for case in cases for key, value in vars(case).items()}
        return {(key, value) for key, value in pairs if key != "name"}

    assert situations(COMBINED) == situations(CASES)
