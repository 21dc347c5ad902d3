"""The patterns in which PyTorch has had gradients wrong, against differences of the function itself."""

from __future__ import annotations

import pytest
import torch

from nnunet_ext.doctor.gradients import patterns, probe
from nnunet_ext.doctor.gradients.patterns import PATTERNS, Pattern, Product


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_reference_of_a_pattern_computes_the_same_and_has_its_derivatives(pattern: Pattern) -> None:
    x, w = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(pattern.own(x, w), pattern.plain(x, w), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(pattern.plain, (x, w))


def test_patterns_are_right_as_they_are() -> None:
    assert list(patterns.wrong("cpu", None)) == []


class Forgets(torch.autograd.Function):
    """As a compiler that takes one tensor given twice for one: the second gradient is lost."""

    @staticmethod
    def forward(ctx: object, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b + a

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def test_lost_gradient_and_error_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        raise RuntimeError

    plain = PATTERNS[0].plain
    monkeypatch.setattr(
        patterns,
        "PATTERNS",
        (
            Pattern(name="lost", own=Forgets.apply, plain=plain),
            Pattern(name="fails", own=fails, plain=plain),
            Pattern(name="right", own=Product.apply, plain=plain),
        ),
    )
    assert list(patterns.wrong("cpu", None)) == ["lost", "fails (RuntimeError)"]
    found = probe._patterns("cpu", "aot_eager")
    assert (found.level, found.detail) == ("failure", "wrong gradients: lost, fails (RuntimeError)")


def test_pattern_that_is_wrong_only_when_compiled_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "wrong", lambda device, backend: ["in place in forward"] if backend else [])
    found = probe._patterns("cpu", "aot_eager")
    assert found.level == "warning"
    assert found.detail == f"wrong when compiled, 1 of {len(PATTERNS)}: in place in forward"
    assert "export nnUNet_compile=f" in found.cure
