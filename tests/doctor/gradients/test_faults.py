"""Faults of the kind that only some situations show, planted in the networks themselves: those situations find them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from nnunet_ext.architectures.checkpointed import levels, repeated, stages
from nnunet_ext.architectures.reversible import recomputation, walk
from nnunet_ext.doctor.gradients import tiny
from nnunet_ext.doctor.gradients.cases import CASES, COMBINED, DOUBLE, Case
from nnunet_ext.doctor.gradients.gate import Gate
from nnunet_ext.doctor.gradients.subjects import subject_of

ALL = (
    "nnUNetTrainerReversible",
    "nnUNetTrainerInvertible",
    "nnUNetTrainerPartiallyInvertibleNoVAE",
    "nnUNetTrainerActivationCheckpointing",
)
Patch = pytest.MonkeyPatch


def lose_later_groups(patch: Patch) -> None:
    """Gradients of weights come from the first group of samples alone."""
    back, add = walk.Walk.back, recomputation.Leaves.add

    def back_once(self: Any, *given: Any) -> None:
        self._leaves.is_first = not hasattr(self._leaves, "is_first")
        back(self, *given)

    def add_first(self: Any, *given: Any) -> None:
        if self.is_first:
            add(self, *given)

    patch.setattr(walk.Walk, "back", back_once)
    patch.setattr(recomputation.Leaves, "add", add_first)
    patch.setattr(levels, "_whole", lambda groups: torch.cat([groups[0], *(x.detach() for x in groups[1:])]))


def draw_anew(patch: Patch) -> None:
    """A recomputed evaluation has other random numbers than the first."""

    @contextmanager
    def nothing(*_: Any) -> Iterator[None]:
        yield

    patch.setattr(recomputation, "_replayed", nothing)
    patch.setattr(repeated, "may_draw", lambda _: False)


def take_present_modes(patch: Patch) -> None:
    """A recomputed evaluation sees the modes of the backward pass."""

    @contextmanager
    def nothing(self: Any) -> Iterator[None]:
        yield

    patch.setattr(recomputation.Modes, "restored", nothing)


def halve_large_batches(patch: Patch) -> None:
    """Gradients of more than two samples are too small."""
    undo, join = walk.Walk.undo, stages._Join.backward

    def undo_half(self: Any, module: nn.Module, finish: Callable[..., Tensor], state: Any, **given: Any) -> None:
        undo(self, module, finish, state, **given)
        if len(state.result) > 2:
            state.d_result = state.d_result / 2

    def join_half(ctx: Any, gradient: Tensor) -> Any:
        return join(ctx, gradient / 2 if len(gradient) > 2 else gradient)

    patch.setattr(walk.Walk, "undo", undo_half)
    patch.setattr(stages._Join, "backward", staticmethod(join_half))


DROPOUT, MODES = "dropout", "evaluation mode before the backward pass"
FAULTS = {  # which cases find it, and which number of the combined ones
    lose_later_groups: ({"three groups of samples"}, 2),
    draw_anew: ({DROPOUT, MODES}, 3),
    take_present_modes: ({MODES}, 3),
    halve_large_batches: ({"three samples"}, 3),
}


def found_by(trainer: str, cases: Sequence[Case]) -> set[str]:
    setting = next(setting for setting in tiny.settings() if setting.configuration == tiny.PLANE)
    gate = Gate(subject_of(trainer, setting).source, "cpu")
    return {case.name for case in cases if _finds(gate, case)}


def _finds(gate: Gate, case: Case) -> bool:
    try:
        return any(entry.difference.is_wrong for entry in gate._compared(DOUBLE, [case]))
    except CheckpointError:  # PyTorch's own checkpoint has seen it; a failure of the command too
        return True


@pytest.mark.parametrize("trainer", ALL)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_found_by_its_cases_alone(fault: Callable[[Patch], None], trainer: str, monkeypatch: Patch) -> None:
    alone, combined = FAULTS[fault]
    fault(monkeypatch)
    assert found_by(trainer, CASES) == alone
    assert found_by(trainer, COMBINED) == {COMBINED[combined].name}
