"""A recomputed evaluation sees what the first one saw, whatever happens in between; and what a step does not do."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_ext.architectures.invertible_unet import InvertibleUNet
from nnunet_ext.architectures.partially_invertible_unet import PartiallyInvertibleUNet
from nnunet_ext.architectures.reversible import recomputation
from nnunet_ext.architectures.reversible.levels import Squeeze
from nnunet_ext.architectures.reversible.recomputation import may_draw, run_recomputed
from nnunet_ext.architectures.reversible_unet import ReversibleUNet
from tests.architectures.reversible.test_sequence import image, pair, relative_error
from tests.architectures.test_reversible_unet import arguments

NETWORKS = [ReversibleUNet, InvertibleUNet, PartiallyInvertibleUNet]


class Operators(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def step(network: nn.Module, between: Any = None, batch: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(batch, 2, 8, 8, 8, dtype=next(network.parameters()).dtype)
    network.zero_grad()
    loss = sum(output.square().mean() for output in network(x))
    if between is not None:
        between(network)
    loss.backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


def fill(network: nn.Module) -> None:
    """Running statistics that are far from those of a batch."""
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.fill_(3.0)


def train_once(network: nn.Module) -> None:
    modes = network.training
    network.train()
    with torch.no_grad():
        network(torch.randn(2, 2, 8, 8, 8, dtype=torch.float64) * 7)
    network.train(modes)


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize("starts_in_training", [True, False])
@pytest.mark.parametrize("between", ["switch", "drop", "fill", "data"])
def test_modes_and_buffers_may_change_between_forward_and_backward(
    network_class: type[nn.Module], starts_in_training: bool, between: str
) -> None:
    torch.manual_seed(0)
    options = {"norm_op": nn.BatchNorm3d, "dropout_op": nn.Dropout3d, "dropout_op_kwargs": {"p": 0.3}}
    network = network_class(2, 3, **arguments([8, 16, 16], **options)).double()
    fill(network)
    network.train(starts_in_training)
    expected = step(copy.deepcopy(network))
    modes = [part.training for part in network.modules()]

    def change(changed: nn.Module) -> None:
        if between == "switch":
            changed.train(not starts_in_training)
        for module in changed.modules():
            if between == "drop" and isinstance(module, nn.Dropout3d):
                module.p = 0.9
        # What is kept by PyTorch's own batch norm may not change in evaluation, as everywhere.
        for name, module in changed.named_modules():
            if between in ("fill", "data") and ".couplings." in f".{name}" and isinstance(module, nn.BatchNorm3d):
                (module.running_var.data if between == "data" else module.running_var).fill_(0.01)

    found = step(network, change)
    assert relative_error(found, expected) <= 1e-8
    if between == "switch":
        assert [part.training for part in network.modules()] == [not mode for mode in modes]


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize("preactivation", [True, False])  # without it nnU-Net's blocks, whose layers have two names
def test_a_step_counts_running_statistics_once(network_class: type[nn.Module], preactivation: bool) -> None:
    states = []
    for reversible in (True, False):
        torch.manual_seed(0)
        options = {"reversible": reversible, "preactivation": preactivation, "norm_op": nn.BatchNorm3d}
        network = network_class(2, 3, **arguments([8, 16, 16], **options)).double()
        tensors = network.state_dict(keep_vars=True)
        step(network)
        after = network.state_dict(keep_vars=True)
        assert all(after[key] is tensor for key, tensor in tensors.items())
        states.append(after)
    for key, buffer in states[1].items():
        torch.testing.assert_close(states[0][key], buffer, rtol=1e-6, atol=1e-9)


def test_buffers_that_an_evaluation_changes_are_those_of_before_when_it_is_repeated() -> None:
    ours, plain = pair(2, extra=spectral_norm(nn.Conv3d(4, 4, 1)))
    for module in (ours, plain):
        module.train()
    x = image()
    found = []
    for module in (ours, plain):
        module.zero_grad()
        module(x).square().mean().backward()
        found.append([p.grad for p in module.parameters()])
    assert relative_error(*found) <= 1e-10


def test_graph_is_walked_twice_with_the_same_statistics_and_masks() -> None:
    ours, _ = pair(2, extra=nn.Sequential(nn.BatchNorm3d(4), nn.Dropout(0.5)))
    loss = ours(image()).square().sum()
    first = torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True)
    ours.eval()
    second = torch.autograd.grad(loss, list(ours.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("random", [nn.Dropout(0.5), nn.RReLU()])
def test_modules_that_are_run_again_keep_modes_and_random_numbers(random: nn.Module) -> None:
    module = nn.Sequential(nn.Conv3d(2, 2, 1), random)
    x = torch.randn(2, 2, 4, 4, 4)
    found = []
    for recomputed in (True, False):
        torch.manual_seed(0)
        module.train().zero_grad()
        loss = run_recomputed(module, recomputed, x).square().sum()
        module.eval()
        loss.backward()
        found.append([p.grad for p in module.parameters()])
        assert not any(part.training for part in module.modules())
    assert relative_error(*found) <= 1e-6


@pytest.mark.parametrize("module", [nn.Dropout(0.1), nn.RReLU(), nn.Sequential(nn.AlphaDropout(0.1))])
def test_modules_that_draw_are_known(module: nn.Module) -> None:
    assert may_draw(module)
    assert not may_draw(nn.Sequential(nn.Conv3d(1, 1, 1), nn.InstanceNorm3d(1), nn.LeakyReLU()))
    assert not may_draw(nn.Dropout(0.1).eval())
    assert not may_draw(nn.Dropout(0.0))


def test_what_is_unknown_or_hooked_may_draw() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rand_like(x)

    hooked = nn.Conv3d(1, 1, 1)
    hooked.register_forward_hook(lambda module, x, y: y * torch.rand_like(y))
    assert may_draw(nn.Sequential(Noise()))
    assert may_draw(hooked)


@pytest.mark.parametrize("network_class", NETWORKS)
def test_generators_are_not_read_where_nothing_draws(
    network_class: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(x: Tensor) -> None:
        raise AssertionError("a generator was read")

    monkeypatch.setattr(recomputation.RandomState, "now", read)
    step(network_class(2, 3, **arguments([8, 16, 16])))


@pytest.mark.parametrize("network_class", NETWORKS)
@pytest.mark.parametrize("exact", [False, True])
def test_a_step_does_not_wait_for_the_device_but_once_in_the_exact_mode(
    network_class: type[nn.Module], exact: bool
) -> None:
    options = {"resampling": "squeeze"} if network_class is InvertibleUNet else {}
    network = network_class(2, 3, exact=exact, **options, **arguments([8, 16, 16]))
    with Operators() as operators:
        step(network)
    assert operators.counts["_local_scalar_dense"] == int(exact)


def test_the_exact_mode_says_once_per_step_that_it_is_left() -> None:
    network = ReversibleUNet(2, 3, exact=True, **arguments([8, 16, 16]))
    with torch.no_grad():
        network.encoder.transitions[0].weight.mul_(1e6)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step(network)
        assert ["streams below 4096" in str(warning.message) for warning in found] == [True]


@pytest.mark.parametrize("group_elements", [None, 1])
@pytest.mark.parametrize("reversible", [True, False])
def test_each_mixing_matrix_is_computed_once_per_step(group_elements: int | None, reversible: bool) -> None:
    network = InvertibleUNet(2, 3, reversible=reversible, **arguments([8, 16, 16]))
    network.group_elements = group_elements
    levels = sum(isinstance(module, Squeeze) for module in network.modules())
    with Operators() as operators:
        step(network, batch=3)
    solves = {name: n for name, n in operators.counts.items() if "solve" in name or "lu" in name.split("_")}
    assert levels == 4
    assert solves.pop("_linalg_solve_ex") == levels
    assert sum(solves.values()) <= levels, solves
    assert operators.counts["_linalg_check_errors"] == 0
    with Operators() as operators, torch.no_grad():
        network.eval()(torch.randn(3, 2, 8, 8, 8))
    assert operators.counts["_linalg_solve_ex"] == levels


def test_mixing_matrix_and_its_keys_are_those_of_pytorchs_parametrization() -> None:
    torch.manual_seed(0)
    ours = Squeeze(4, (2, 1), True)
    torch.manual_seed(0)
    theirs = orthogonal(nn.Linear(8, 8, bias=False), orthogonal_map="cayley", use_trivialization=False)
    expected = theirs.state_dict()
    assert ours.mixing.state_dict().keys() == expected.keys()
    for key, value in ours.mixing.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
    torch.testing.assert_close(ours.matrix(), theirs.weight)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_mixing_is_inverted_in_full_precision_and_the_setting_stays(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in ("mm", "bmm"):
                matmul = torch.backends.cuda.matmul
                seen.append(getattr(matmul, "fp32_precision", torch.get_float32_matmul_precision))
            return func(*args, **(kwargs or {}))

    try:
        torch.set_float32_matmul_precision(precision)
        squeeze, x = Squeeze(4, (2, 2), True), torch.randn(1, 4, 4, 4)
        with torch.no_grad(), Watch():
            y = squeeze(x)
            torch.testing.assert_close(squeeze.inverse(y), x, rtol=0, atol=1e-5)
        assert [value if isinstance(value, str) else value() for value in seen] != []
        assert all(value == "ieee" for value in seen if isinstance(value, str))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("network_class", NETWORKS)
def test_prediction_between_training_steps_is_compiled_in_one_graph(network_class: type[nn.Module]) -> None:
    torch._dynamo.reset()
    network = network_class(2, 3, **arguments([8, 16, 16]))
    compiled = torch.compile(network, backend="aot_eager")
    x = torch.randn(2, 2, 8, 8, 8)
    compiled(x)[0].sum().backward()
    network.eval()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for found, wanted in zip(compiled(x), network(x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
