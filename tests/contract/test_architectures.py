"""What every registered architecture promises (docs/how-to/add-a-method.md); a new one gets these tests for free."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from nnunet_ext import registry
from tests.contract.plans import PATCHES, arguments

ARCHITECTURES = registry.names("architectures")
CHANNELS, CLASSES, BATCH = 2, 3, 2
SLOW_BUT_3D = [pytest.param(case, marks=[] if case == "3d" else [pytest.mark.slow]) for case in PATCHES]
NARROW = {"ImplicitUNet": {"decoder_width": 64}}  # as narrow as the plans' stages


@pytest.fixture(params=ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=PATCHES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def build(name: str, case: str, deep_supervision: bool = False, channels: int = CHANNELS, classes: int = CLASSES):
    torch.manual_seed(0)
    network_class = registry.resolve("architectures", name)
    network = network_class(
        input_channels=channels,
        num_classes=classes,
        deep_supervision=deep_supervision,
        **{**arguments(case), **NARROW.get(name, {})},
    )
    network.apply(network.initialize)
    for module in network.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0  # equal networks have equal gradients only where they drop nothing
    return network


def image(case: str, channels: int = CHANNELS, batch: int = BATCH) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, channels, *PATCHES[case])


def loss_of(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return sum(output.float().square().mean() for output in outputs)


def train_gradients(network: nn.Module, x: Tensor) -> list[Tensor]:
    network.train().zero_grad()
    loss_of(network(x)).backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


def test_at_least_one_architecture_is_registered() -> None:
    assert ARCHITECTURES


def test_evaluation_gives_one_dense_writable_tensor(name: str, case: str) -> None:
    network = build(name, case).eval()
    with torch.inference_mode():
        logits = network(image(case))
        logits *= 2
    assert logits.shape == (BATCH, CLASSES, *PATCHES[case])
    assert logits.isfinite().all()


def test_deep_supervision_gives_a_list_largest_first_at_the_scales_of_nnunet(name: str, case: str) -> None:
    network = build(name, case, deep_supervision=True).train()
    if not hasattr(network, "decoder"):
        pytest.skip("without a decoder there is nothing to supervise: its trainer overrides the switch")
    outputs = network(image(case))
    strides = np.cumprod(arguments(case)["strides"], axis=0)[:-1]
    expected = [(BATCH, CLASSES, *(np.array(PATCHES[case]) // stride)) for stride in strides]
    assert [tuple(output.shape) for output in outputs] == expected
    network.decoder.deep_supervision = False
    assert isinstance(network(image(case)), Tensor)


def test_every_weight_receives_a_finite_gradient(name: str, case: str) -> None:
    network = build(name, case, deep_supervision=True)
    train_gradients(network, image(case))
    missing = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


@pytest.mark.parametrize(("channels", "classes"), [(1, 1), (4, 14)])
def test_any_number_of_channels_and_classes(name: str, channels: int, classes: int) -> None:
    network = build(name, "3d", channels=channels, classes=classes).eval()
    assert network(image("3d", channels)).shape[1] == classes


@pytest.mark.parametrize("number", [0, -1, 10**9, None, True, "2", 2.0, np.array([2])])
@pytest.mark.parametrize("argument", ["input_channels", "num_classes"])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_number_that_counts_no_channels_is_refused_before_any_weight(
    name: str, argument: str, number: object, by_name: bool
) -> None:
    network_class = registry.resolve("architectures", name)
    numbers = {"input_channels": CHANNELS, "num_classes": CLASSES, argument: number}
    named, positional = (numbers, ()) if by_name else ({}, numbers.values())
    with pytest.raises(ValueError, match=rf"^{argument} must be a whole number of 1 to 65536, got .*: correct"):
        network_class(*positional, **named, **arguments("2d"))


def test_numbers_of_numpy_count_channels(name: str) -> None:
    network = build(name, "3d", channels=np.int64(2), classes=np.int8(3)).eval()
    assert network(image("3d")).shape[1] == 3


def test_state_dict_loads_strictly_also_after_eval(name: str, case: str) -> None:
    network, twin = build(name, case, deep_supervision=True), build(name, case)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    network.eval()
    stored = io.BytesIO()
    torch.save(network.state_dict(), stored)
    stored.seek(0)
    twin.eval().load_state_dict(torch.load(stored, weights_only=True), strict=True)
    if hasattr(network, "decoder"):
        network.decoder.deep_supervision = False
    with torch.inference_mode():
        torch.testing.assert_close(twin(image(case)), network(image(case)), rtol=0, atol=0)


def test_predicts_as_nnunet_calls_it(name: str, case: str) -> None:
    """Built and loaded on the CPU; for each fold weights, move to the device and eval() within inference mode."""
    network = build(name, case)
    x = image(case)[(..., *(slice(size // 2) for size in PATCHES[case]))].double()
    folds = [copy.deepcopy(network.state_dict()) for _ in range(2)]
    for tensor in folds[1].values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * 0.05)
    network.load_state_dict(folds[0])
    for fold in folds:
        with torch.inference_mode():
            network.load_state_dict(fold)
            network = network.to(torch.float64)  # as a move to another device does, it leaves inference tensors
            network.eval()
            found = [network(x), network(x)]
        wanted = build(name, case)
        wanted.load_state_dict(fold)
        wanted = wanted.double().eval()(x).detach()
        for logits in found:
            torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-6)


def test_deepcopy_computes_the_same_and_shares_nothing(name: str) -> None:
    network = build(name, "3d").eval()
    twin = copy.deepcopy(network)
    expected = network(image("3d")).detach()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(image("3d")).detach(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("save", [torch.save, lambda network, file: pickle.dump(network, file)])
def test_saved_whole_it_computes_and_trains_the_same(name: str, save: Callable[[nn.Module, io.BytesIO], None]) -> None:
    network = build(name, "3d", deep_supervision=True)
    expected = train_gradients(network, image("3d"))
    stored = io.BytesIO()
    save(network, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False) if save is torch.save else pickle.load(stored)
    assert loaded.state_dict().keys() == network.state_dict().keys()
    for found, wanted in zip(train_gradients(loaded, image("3d")), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_to_half_precision_it_predicts_nearly_the_same(name: str, dtype: torch.dtype) -> None:
    network = build(name, "3d").eval()
    with torch.inference_mode():
        expected = network(image("3d"))
        found = copy.deepcopy(network).to(dtype)(image("3d").to(dtype))
    assert found.dtype == dtype
    assert torch.nn.functional.cosine_similarity(found.float().flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("case", SLOW_BUT_3D)
def test_backward_outside_autocast_is_close_to_float32(name: str, case: str) -> None:
    network = build(name, case, deep_supervision=True).train()
    expected = torch.cat([g.flatten() for g in train_gradients(network, image(case))])
    network.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(network(image(case)))
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    # nnU-Net's own network: 0.994. Pooling turns rounding into other gradients (0.978); wrong ones are far below.
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.95


@pytest.mark.parametrize("case", SLOW_BUT_3D)
def test_compiled_network_has_the_same_gradients(name: str, case: str) -> None:
    torch._dynamo.reset()
    network = build(name, case, deep_supervision=True)
    expected = train_gradients(network, image(case))
    compiled = torch.compile(network, backend="aot_eager")
    for found, wanted in zip(train_gradients(compiled, image(case)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def under_checkpoint(network: nn.Module, x: Tensor) -> list[Tensor]:
    loss_of(checkpoint(network, x, use_reentrant=False)).backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


def with_copies_kept(network: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):  # as `save_on_cpu` on CUDA
        loss = loss_of(network(x))
    loss.backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


def called_with_weights(network: nn.Module, x: Tensor) -> list[Tensor]:
    weights = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(-1)
    loss_of(torch.func.functional_call(network, weights, (x,))).backward()
    return [p.grad for p in weights.values() if p.grad is not None]


def other_weights_before_backward(network: nn.Module, x: Tensor) -> list[Tensor]:
    weights = list(network.parameters())
    loss = loss_of(network(x))
    network.load_state_dict(network.state_dict() | {n: -p for n, p in network.named_parameters()}, assign=True)
    loss.backward()
    return [p.grad for p in weights if p.grad is not None]


def by_hooks(network: nn.Module, x: Tensor) -> list[Tensor]:
    found: dict[int, list[Tensor]] = {}
    for i, parameter in enumerate(network.parameters()):
        parameter.register_hook(found.setdefault(i, []).append)
    loss_of(network(x)).backward()
    return [gradient for i in sorted(found) for gradient in found[i]]


def by_torch_func(network: nn.Module, x: Tensor) -> list[Tensor]:
    weights = {name: p.detach() for name, p in network.named_parameters() if p.grad is not None}
    call = torch.func.functional_call
    return [*torch.func.grad(lambda own: loss_of(call(network, own, (x,))))(weights).values()]


@pytest.mark.parametrize(
    "way",
    [under_checkpoint, with_copies_kept, called_with_weights, other_weights_before_backward, by_hooks, by_torch_func],
)
def test_gradients_are_the_same_on_every_way_of_pytorch_to_ask_for_them(
    name: str, way: Callable[[nn.Module, Tensor], list[Tensor]]
) -> None:
    network = build(name, "3d", deep_supervision=True).double()
    x = image("3d").double()
    expected = train_gradients(network, x)
    if way is not by_torch_func:
        network.zero_grad()
    found = way(network, x)
    assert len(found) == len(expected)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True])
def test_samples_in_vmap_are_predicted_as_each_by_itself(name: str, autocast: bool) -> None:
    network, x = build(name, "3d").eval(), image("3d")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = torch.func.vmap(lambda sample: network(sample[None])[0])(x)
        expected = torch.cat([network(sample[None]) for sample in x])
    assert nn.functional.cosine_similarity(found.flatten().float(), expected.flatten().float(), dim=0) > 0.999


def test_exported_in_the_mode_of_gradients_it_predicts_the_same(name: str) -> None:
    network, x = build(name, "3d").eval(), image("3d")
    exported = torch.export.export(network, (x,), strict=False).module()
    torch.testing.assert_close(exported(2 * x), network(2 * x), rtol=1e-4, atol=1e-4)


def test_channels_last_gives_the_same_logits(name: str, case: str) -> None:
    network = build(name, case).eval()
    layout = torch.channels_last if len(PATCHES[case]) == 2 else torch.channels_last_3d
    with torch.inference_mode():
        expected = network(image(case))
        found = network.to(memory_format=layout)(image(case).to(memory_format=layout))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_feature_map_size_grows_with_the_patch(name: str, case: str) -> None:
    network = build(name, case, deep_supervision=True)
    patch = PATCHES[case]
    small = network.compute_conv_feature_map_size(patch)
    large = network.compute_conv_feature_map_size([2 * size for size in patch])
    assert small > 0
    assert large == pytest.approx(2 ** len(patch) * small, rel=0.3)


def test_no_input_is_changed(name: str, case: str) -> None:
    network = build(name, case, deep_supervision=True)
    x = image(case)
    train_gradients(network, x)
    torch.testing.assert_close(x, image(case), rtol=0, atol=0)
