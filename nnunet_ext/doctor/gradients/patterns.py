"""Backward passes of own making that PyTorch itself has had wrong when compiled: each alone, on a few numbers.

A pattern is right where its gradients are those of the same computation by plain autograd. Whose networks use none of
them is not concerned; whoever writes one should know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Run = Callable[[Tensor, Tensor], Tensor]  # of the product, the input and a weight


class Product(torch.autograd.Function):
    """``a * b + a``."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(a, b)
        return a * b + a

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients that are wanted."""
        a, b = ctx.saved_tensors
        wants_a, wants_b = ctx.needs_input_grad
        return gradient * (b + 1) if wants_a else None, gradient * a if wants_b else None


class FirstOnly(torch.autograd.Function):
    """``2 * a``; the second input gets no gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        """Double the first."""
        return 2 * a

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Of the first."""
        return 2 * gradient, None


class InPlace(torch.autograd.Function):
    """``3 * a``, by an addition in place."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        """Add to a copy."""
        y = a.clone()
        y += 2 * a
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Triple it."""
        return 3 * gradient


class TwoOutputs(torch.autograd.Function):
    """``a * a`` and ``2 * a``; an output that is not used has no gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> tuple[Tensor, Tensor]:
        """Both."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a)
        return a * a, 2 * a

    @staticmethod
    def backward(ctx: Any, first: Tensor | None, second: Tensor | None) -> Tensor | None:
        """Of what is used."""
        (a,) = ctx.saved_tensors
        found = None if first is None else 2 * first * a
        if second is None:
            return found
        return 2 * second if found is None else found + 2 * second


class Transposed(torch.autograd.Function):
    """``a.T``, a view, whose gradient is one too."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        """View it."""
        return a.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """View it back."""
        return gradient.t()


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a * b + a


def _offloaded(run: Run) -> Run:
    def within(x: Tensor, w: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            h = x.square()
            y: Tensor = checkpoint(run, h, w, use_reentrant=False)
            return y.square()

    return within


def _kept(run: Run) -> Run:
    return lambda x, w: run(x.square(), w).square()


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """One computation.

    Args:
        name: Of messages.
        own: With a backward pass of own making.
        plain: The same by plain autograd.
        compiled: What is compiled, where it is not `own` as a whole.
        frozen: Whether the weight wants no gradient.
    """

    name: str
    own: Run
    plain: Run
    compiled: Callable[[Callable[[Run], Run]], Run] | None = None
    frozen: bool = False


def _sines(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).sin().sin()


PATTERNS = (
    Pattern(name="two inputs", own=Product.apply, plain=_product),
    # https://github.com/pytorch/pytorch/issues/183604
    Pattern(
        name="one tensor as two inputs", own=lambda x, w: Product.apply(x, x) * w, plain=lambda x, w: _product(x, x) * w
    ),
    # https://github.com/pytorch/pytorch/issues/181146
    Pattern(
        name="one tensor as two inputs, one without gradient",
        own=lambda x, w: FirstOnly.apply(x, x) * w,
        plain=lambda x, w: 2 * x * w,
    ),
    # https://github.com/pytorch/pytorch/issues/180642
    Pattern(name="in place in forward", own=lambda x, w: InPlace.apply(x) * w, plain=lambda x, w: 3 * x * w),
    Pattern(name="a frozen input", own=Product.apply, plain=_product, frozen=True),
    Pattern(name="an unused output", own=lambda x, w: TwoOutputs.apply(x)[1] * w, plain=lambda x, w: 2 * x * w),
    Pattern(
        name="a view, and gradients that are not contiguous",
        own=lambda x, w: Transposed.apply(x * w).t() @ w,
        plain=lambda x, w: (x * w) @ w,
    ),
    Pattern(
        name="one weight used twice",
        own=lambda x, w: Product.apply(Product.apply(x, w), w),
        plain=lambda x, w: _product(_product(x, w), w),
    ),
    Pattern(
        name="a checkpoint given one tensor twice",
        own=lambda x, w: checkpoint(_product, x, x, use_reentrant=False) * w,
        plain=lambda x, w: _product(x, x) * w,
    ),
    # https://github.com/pytorch/pytorch/issues/147565
    Pattern(
        name="a checkpoint within save_on_cpu",
        own=_offloaded(_sines),
        plain=_kept(_sines),
        compiled=lambda compile_: _offloaded(compile_(_sines)),
    ),
)


def wrong(device: str, backend: str | None) -> Iterator[str]:
    """Names of the patterns whose gradients are wrong, or which raise.

    Args:
        device: "cpu" or "cuda".
        backend: Of `torch.compile`; None: not compiled.
    """
    for pattern in PATTERNS:
        run = pattern.own
        if backend is not None:
            torch._dynamo.reset()
            compile_ = partial(torch.compile, backend=backend)
            run = pattern.compiled(compile_) if pattern.compiled else compile_(pattern.own)
        wanted = _gradients(pattern.plain, pattern, device)
        try:
            found = _gradients(run, pattern, device)
        except Exception as error:
            yield f"{pattern.name} ({type(error).__name__})"
            continue
        if not all(_is_close(mine, theirs) for mine, theirs in zip(found, wanted, strict=True)):
            yield pattern.name


def _gradients(run: Run, pattern: Pattern, device: str) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(3, 3, generator=generator, dtype=torch.float64).to(device) for _ in range(2))
    x.requires_grad_()
    w.requires_grad_(not pattern.frozen)
    y = run(x, w)
    factors = torch.randn(3, 3, generator=generator, dtype=torch.float64).to(device)
    (y.t() * factors).sum().backward()
    return [x.grad, w.grad]


def _is_close(mine: Tensor | None, theirs: Tensor | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    return torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
