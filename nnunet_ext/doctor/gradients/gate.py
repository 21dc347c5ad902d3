"""Compares the gradients of one training step with those of plain autograd, in every form that nnU-Net trains in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nnunet_ext.doctor.gradients import slopes
from nnunet_ext.doctor.gradients.cases import DOUBLE, ORDINARY, SINGLE, Case, Precision, mixed
from nnunet_ext.doctor.gradients.changes import NotThereError
from nnunet_ext.doctor.gradients.compare import Difference, in_double, in_mixed, in_single
from nnunet_ext.doctor.gradients.step import Gradients, Source, Step


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How far the gradients of one form of a step are from plain autograd's.

    Args:
        case: Name of the situation.
        precision: Name of the precision.
        backend: That it was compiled with; None: not compiled.
        difference: Of the gradient that is furthest off.
    """

    case: str
    precision: str
    backend: str | None
    difference: Difference

    @property
    def what(self) -> str:
        """The form in words."""
        return f"{self.case}, {self.precision}" + (f", compiled by {self.backend}" if self.backend else "")


class Gate:
    """The forms of one step.

    Args:
        source: What the step is made of.
        device: "cpu" or "cuda".
    """

    def __init__(self, source: Source, device: str) -> None:
        self._source, self._device, self._mixed = source, device, mixed(device)
        self._precise: Gradients | None = None  # plain, ordinary, in float32: what autocast is measured by

    def eager(self, cases: Sequence[Case]) -> Iterator[Measured]:
        """As it is: all cases in float64, there also by differences of the loss; then float32, autocast."""
        yield self._by_slopes()
        for case in cases:
            yield from self._compared(DOUBLE, [case])
        yield from self._compared(SINGLE, [ORDINARY])
        yield from self._compared(self._mixed, [ORDINARY])

    def compiled(
        self, backend: str, cases: Sequence[Case], only: frozenset[str] | None = None, with_autocast: bool = True
    ) -> Iterator[Measured]:
        """As nnU-Net trains on CUDA.

        Args:
            backend: Of `torch.compile`.
            cases: Compared in float64; under autocast the ordinary one is. Those with dropout are left out: a compiler
                may draw other random numbers than plain autograd.
            only: Kinds of parts that are compiled, see `Step`.
            with_autocast: Whether it is compiled under autocast too.
        """
        alike: dict[tuple[bool, ...], list[Case]] = {}
        for case in cases:
            if not case.dropout:
                alike.setdefault((case.deep_supervision, case.shared, case.grouped), []).append(case)
        for group in alike.values():
            yield from self._compared(DOUBLE, group, backend, only)
        if with_autocast:
            yield from self._compared(self._mixed, [ORDINARY], backend, only)

    def _by_slopes(self) -> Measured:
        step = self._step(DOUBLE, ORDINARY)
        value = slopes.slope_error(step)
        difference = Difference(name="all along a direction", value=value, limit=slopes.TOLERANCE)
        return Measured(case="differences of the loss", precision=DOUBLE.name, backend=None, difference=difference)

    def _compared(
        self,
        precision: Precision,
        cases: Sequence[Case],
        backend: str | None = None,
        only: frozenset[str] | None = None,
    ) -> Iterator[Measured]:
        """Compare cases that one step can run."""
        try:
            step = self._step(precision, cases[0], backend, only)
            plain = step if backend is None else self._step(precision, cases[0])
        except NotThereError:
            return
        names = [*step.names, "input"]
        for case in cases:
            difference = self._difference(names, precision, case, step, plain)
            yield Measured(case=case.name, precision=precision.name, backend=backend, difference=difference)

    def _difference(
        self, names: Sequence[str], precision: Precision, case: Case, step: Step, plain: Step
    ) -> Difference:
        found, wanted = step.gradients(case), plain.gradients(case, kept=True)
        if precision is DOUBLE:
            return in_double(names, found, wanted)
        if precision is SINGLE:
            self._precise = wanted
            return in_single(names, found, wanted)
        if self._precise is None:
            self._precise = self._step(SINGLE, ORDINARY).gradients(ORDINARY, kept=True)
        return in_mixed(names, found, wanted, self._precise)

    def _step(
        self, precision: Precision, case: Case, backend: str | None = None, only: frozenset[str] | None = None
    ) -> Step:
        return Step(
            self._source,
            precision,
            self._device,
            deep_supervision=case.deep_supervision,
            shared=case.shared,
            grouped=case.grouped,
            dropout=case.dropout,
            backend=backend,
            only=only,
        )
