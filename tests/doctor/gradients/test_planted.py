"""That the gate can fail: each planted wrong gradient is found, and in the form in which it is wrong."""

from __future__ import annotations

import pytest
import torch

from nnunet_ext.doctor.gradients import compare, gate, planted, probe, slopes
from nnunet_ext.doctor.gradients.cases import ORDINARY
from nnunet_ext.doctor.gradients.gate import Gate, Measured

SLOPES = "differences of the loss, float64"
WRONG = {
    "eager": {SLOPES, "ordinary, float64", "ordinary, float32", "ordinary, autocast to bfloat16"},
    "compiled": {"ordinary, float64, compiled by aot_eager", "ordinary, autocast to bfloat16, compiled by aot_eager"},
    "autocast": {"ordinary, autocast to bfloat16"},
    "reference": {SLOPES},
    None: set(),
}


def measured(place: planted.Place | None) -> list[Measured]:
    found = Gate(planted.source(place), "cpu")
    return [*found.eager([ORDINARY]), *(found.compiled("aot_eager", [ORDINARY]) if place in ("compiled", None) else ())]


def test_every_place_has_its_expectation() -> None:
    assert set(WRONG) == {*planted.PLACES, None}


@pytest.mark.parametrize("place", WRONG)
def test_gate_finds_what_is_wrong_and_nothing_else(place: planted.Place | None) -> None:
    assert {entry.what for entry in measured(place) if entry.difference.is_wrong} == WRONG[place]


def test_planted_gradient_is_half_of_what_numbers_say() -> None:
    x = torch.randn(8, dtype=torch.float64, requires_grad=True)
    planted.WrongBackward.apply(x).sum().backward()
    width = 1e-6
    rectify = torch.nn.functional.leaky_relu
    slope = (rectify(x + width) - rectify(x - width)).detach() / (2 * width)
    torch.testing.assert_close(x.grad, slope / 2, rtol=1e-6, atol=1e-6)


def test_gate_that_sees_nothing_fails_its_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = compare.Difference(name="input", value=0.0, limit=1.0)
    for name in ("in_double", "in_single", "in_mixed"):
        monkeypatch.setattr(gate, name, lambda *_: blind)
    monkeypatch.setattr(slopes, "slope_error", lambda _: 0.0)
    found = probe._self_test("cpu", "aot_eager")
    assert found.level == "failure"
    assert found.detail.endswith("eager, compiled, autocast, reference")


def test_gate_that_sees_ghosts_fails_its_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slopes, "slope_error", lambda _: 1.0)
    assert probe._self_test("cpu", "aot_eager").detail.endswith(": nowhere")
