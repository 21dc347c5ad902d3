"""One tensor given twice: PyTorch has lost one of its two gradients in functions of own making."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nnunet_ext.architectures.checkpointed.repeated import repeated
from nnunet_ext.architectures.common.kept import everything_kept
from nnunet_ext.architectures.reversible.chain import Chain
from nnunet_ext.architectures.reversible.coupling import AdditiveCoupling
from nnunet_ext.architectures.reversible.recomputation import run_recomputed
from nnunet_ext.architectures.reversible.transitions import Head, Tap

DIM = 4


class Joined(nn.Module):
    """Two inputs that are treated differently."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(DIM, DIM, 1), nn.Conv2d(DIM, DIM, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.first(a).sin() * self.second(b).cos()


def gradients(run: Callable[[Tensor], Tensor], module: nn.Module) -> list[Tensor]:
    x = torch.randn(2, DIM, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = run(x)
    factors = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((y * factors).sum(), [x, *module.parameters()]))


@pytest.fixture
def joined() -> Joined:
    torch.manual_seed(0)
    return Joined().double()


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("way", ["repeated", "run_recomputed"])
def test_checkpoint_of_one_tensor_given_twice_has_both_gradients(way: str, backend: str | None, joined: Joined) -> None:
    def run(x: Tensor) -> Tensor:
        if way == "repeated":
            found: Tensor = repeated(joined, [joined], x, x)
            return found
        return run_recomputed(joined, True, x, x)

    torch._dynamo.reset()
    found = gradients(run if backend is None else torch.compile(run, backend=backend), joined)
    torch._dynamo.reset()
    for mine, theirs in zip(found, gradients(lambda x: joined(x, x), joined), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("outputs", ["last", "last and taps"])
def test_chain_whose_halves_are_one_tensor_has_both_gradients(outputs: str, is_shared: bool) -> None:
    torch.manual_seed(0)
    f = nn.Sequential(nn.Conv2d(DIM, DIM, 3, padding=1), nn.Tanh())
    g = f if is_shared else nn.Sequential(nn.Conv2d(DIM, DIM, 3, padding=1), nn.Tanh())
    head = nn.Conv2d(2 * DIM, 2 * DIM, 1)
    modules = nn.ModuleList([f, g, head]).double()
    taps = [Tap(), Head(head), Head(head)] if outputs == "last and taps" else []
    chain = Chain(steps=[AdditiveCoupling(f, g), *taps, AdditiveCoupling(g, f)])

    def run(x: Tensor) -> Tensor:
        return torch.cat(chain(torch.cat((x, x), dim=1)))

    def kept(x: Tensor) -> Tensor:
        with everything_kept():
            return run(x)

    used = modules if taps else modules[:2]
    for mine, theirs in zip(gradients(run, used), gradients(kept, used), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_coupling_of_one_tensor_is_its_formula() -> None:
    torch.manual_seed(0)
    f, g = (nn.Conv2d(DIM, DIM, 1).double() for _ in range(2))
    modules = nn.ModuleList([f, g])
    coupling = AdditiveCoupling(f, g)
    found = gradients(lambda x: torch.cat(coupling(x, x), dim=1), modules)
    wanted = gradients(lambda x: torch.cat((x + f(x), x + g(x + f(x))), dim=1), modules)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_everything_is_kept_within_and_recomputed_after() -> None:
    f, g = (nn.Conv2d(DIM, DIM, 1) for _ in range(2))
    chain = Chain(steps=[AdditiveCoupling(f, g)])
    x = torch.randn(1, 2 * DIM, 2, 2, requires_grad=True)
    name = type(chain(x)[0].grad_fn).__name__
    with everything_kept(), everything_kept():
        assert type(chain(x)[0].grad_fn).__name__ != name
    assert type(chain(x)[0].grad_fn).__name__ == name
