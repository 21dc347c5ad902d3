"""Additive couplings on one resolution, with activation memory constant in depth; see `chain`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from nnunet_ext.architectures.reversible.chain import Chain
from nnunet_ext.architectures.reversible.coupling import AdditiveCoupling, ExactRange


class ReversibleSequence(nn.Module):
    """Additive couplings on the two halves of the channels, with activation memory constant in depth.

    In training only the output is kept; the backward pass recomputes the input of each coupling from its output
    (one more evaluation of every `f` and `g`: 4/3 of the FLOPs of plain autograd). Gradients equal plain autograd's
    up to the rounding of the inversion, exactly in the exact mode (tests/architectures/reversible/test_sequence.py).

    Args:
        couplings: One coupling or more; all of them exact or none.
        reversible, group_elements, exact_range: See `Chain`.

    Shape: (B, C, *spatial) -> (B, C, *spatial), C even.

    Raises:
        ValueError: odd number of channels; exact mode on a dtype other than float32 or float64.
        RuntimeError: `f` or `g` changes its input in place.
    """

    def __init__(
        self,
        couplings: Iterable[AdditiveCoupling],
        *,
        reversible: bool = True,
        group_elements: int | None = None,
        exact_range: ExactRange | None = None,
    ) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(couplings)
        self.reversible = reversible
        self.group_elements = group_elements
        self.exact_range = exact_range or ExactRange()
        modes = {coupling.exact for coupling in self.couplings}
        if len(modes) != 1:
            raise ValueError(f"A ReversibleSequence needs couplings that are all exact or all not, got {modes}.")
        self.exact = bool(modes.pop())

    def forward(self, x: Tensor) -> Tensor:
        """Run all couplings."""
        return self._chain()(x)[0]

    def inverse(self, y: Tensor) -> Tensor:
        """Return the x with ``forward(x) == y``, for a module in evaluation mode or without running statistics."""
        return self._chain().inverse(y)

    def _chain(self) -> Chain:
        steps: list[Any] = list(self.couplings)
        return Chain(
            steps=steps,
            exact=self.exact,
            reversible=self.reversible,
            group_elements=self.group_elements,
            exact_range=self.exact_range,
        )
