"""One training step of a trainer's network with a surrogate loss, and the gradients that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nnunet_ext.architectures.common.kept import everything_kept
from nnunet_ext.architectures.expanded.partial_pass import evaluating
from nnunet_ext.doctor.gradients.cases import ORDINARY, Case, Precision
from nnunet_ext.doctor.gradients.changes import drop, share
from nnunet_ext.doctor.gradients.describe import kind
from nnunet_ext.doctor.gradients.groups import groups_of_one
from nnunet_ext.memory.network import training_outputs
from nnunet_ext.memory.step import passes_of
from nnunet_ext.protocols import CompilesParts

Gradients = list[Tensor | None]  # of the parameters in their order, then of the input

_SCALE = 2.0**10  # of a loss whose gradients float16 shall hold
_NOISE = 0.1  # is added to all weights: those that start at zero would hide what stands before them


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a step is made of.

    Args:
        build: Builds the network, with or without deep supervision.
        form: Makes of it what a training step runs.
        shape: (B, C, *patch) of the input.
    """

    build: Callable[[bool], nn.Module]
    form: Callable[[nn.Module], nn.Module]
    shape: tuple[int, ...]


class Step:
    """A step that can be run in several cases, always with the same weights and numbers.

    Args:
        source: What it is made of.
        precision: How it computes.
        device: "cpu" or "cuda".
        deep_supervision, shared, grouped, dropout: See `Case`.
        backend: Of `torch.compile`; None: nothing is compiled.
        only: Kinds of parts that are compiled, each once; None: the step as its trainer compiles it.

    Raises:
        NotThereError: weights shall be shared, and no two layers are alike; dropout shall follow what is not there.
    """

    def __init__(
        self,
        source: Source,
        precision: Precision,
        device: str,
        *,
        deep_supervision: bool = True,
        shared: bool = False,
        grouped: bool = False,
        dropout: bool = False,
        backend: str | None = None,
        only: frozenset[str] | None = None,
    ) -> None:
        self._shape, self._precision, self._device = source.shape, precision, device
        torch.manual_seed(0)
        self._grouping = groups_of_one if grouped else nullcontext
        with self._grouping():
            network = source.build(deep_supervision).train()
        if shared:
            share(network)
        if dropout:
            drop(network)
        self.form = source.form(network)
        with torch.no_grad():
            for parameter in self.form.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=_NOISE)
        self.form.to(device, precision.dtype)
        self.parameters = list(self.form.parameters())
        self.names = [name for name, _ in self.form.named_parameters()]
        if backend is not None:
            torch._dynamo.reset()  # what is compiled of other networks would count in its limits
            self._compile(backend, only)

    def _compile(self, backend: str, only: frozenset[str] | None) -> None:
        if only is None:
            self.form.compile(backend=backend)
            return
        left = set(only)
        for part, _ in passes_of(self.form, self.input(ORDINARY)):
            if kind(trained(part)) in left:
                left.remove(kind(trained(part)))
                compile_ = part.compile_levels if isinstance(part, CompilesParts) else part.compile
                compile_(backend=backend)

    def gradients(self, case: Case, kept: bool = False) -> Gradients:
        """Run all backward passes of a case.

        Args:
            case: The situation.
            kept: Whether plain autograd keeps everything.
        """
        for i, parameter in enumerate(self.parameters):
            parameter.grad = None
            parameter.requires_grad_(not (case.frozen and i % 2))
        total: Tensor | None = None
        for number in range(case.backward_passes):
            x = self.input(case, number)
            for loss in self.losses(x, case, kept):
                scale = _SCALE if self._precision.autocast == torch.float16 else 1.0
                with evaluating(self.form) if case.evaluated else nullcontext():
                    (loss * scale).backward()
            if x.grad is not None:
                total = x.grad if total is None else total + x.grad
        scale = _SCALE if self._precision.autocast == torch.float16 else 1.0
        found = [*(parameter.grad for parameter in self.parameters), total]
        return [None if g is None else g.detach().double().cpu() / scale for g in found]

    def input(self, case: Case, number: int = 0) -> Tensor:
        """The batch of a backward pass, a leaf."""
        generator = torch.Generator().manual_seed(number + 1)
        shape = (case.samples, *self._shape[1:])
        x = torch.randn(*(shape[:2] + shape[:1:-1] if case.strided else shape), generator=generator)
        if case.equal_samples:
            x = x[:1].repeat(len(x), *[1] * (x.dim() - 1))
        x = x.to(self._device, self._precision.dtype)
        if case.strided:
            x = x.permute(0, 1, *range(x.dim() - 1, 1, -1))
        return x.requires_grad_(not case.frozen)

    def losses(self, x: Tensor, case: Case, kept: bool = False) -> Iterator[Tensor]:
        """Yield the loss of each pass before its backward pass."""
        for part, data in passes_of(self.form, x):
            torch.manual_seed(0)  # of points, of noise and of dropout
            keeping = everything_kept() if kept else nullcontext()
            with self._autocast(), _hooks(case), self._grouping(), keeping:
                outputs = training_outputs(part, data)
            yield loss_of(outputs, case)
            del outputs

    def _autocast(self) -> AbstractContextManager[Any]:
        low = self._precision.autocast
        return nullcontext() if low is None else torch.autocast(self._device, dtype=low)


def _hooks(case: Case) -> AbstractContextManager[Any]:
    return torch.autograd.graph.save_on_cpu() if case.offloaded else nullcontext()


def loss_of(outputs: Any, case: Case) -> Tensor:
    """A loss whose gradient is dense and different everywhere.

    Args:
        outputs: Of training: logits, lists of them, whatever else stands beside.
        case: The situation.
    """
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    terms = []
    for i, leaf in enumerate(leaves[:1] if case.first_only else leaves):
        y = leaf.transpose(1, -1) if case.strided else leaf
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        terms.append((y.square() + y * factors.to(y)).mean())
    return torch.stack(terms).sum()


def trained(part: nn.Module) -> nn.Module:
    """What a part of a step trains: its student, where a teacher stands beside it."""
    found: nn.Module = getattr(part, "trained_network", part)
    return found
