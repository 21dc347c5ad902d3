"""Checkpointed networks: nnU-Net's own are the reference, bit for bit where samples are not apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.regularization import DropPath
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
from torch import Tensor, nn

from nnunet_ext.architectures.checkpointed import levels, stages
from nnunet_ext.architectures.checkpointed.unet import CheckpointedPlainConvUNet, CheckpointedResidualEncoderUNet
from nnunet_ext.architectures.me_unet import DualMeUNet
from nnunet_ext.architectures.post_concat_unet import PostConcatUNet
from tests.contract.plans import isotropic

NETWORKS: dict[str, tuple[Any, Any]] = {
    "plain": (PlainConvUNet, CheckpointedPlainConvUNet),
    "resenc": (ResidualEncoderUNet, CheckpointedResidualEncoderUNet),
}
SIZE = (8, 16, 12)
ANISOTROPIC = {"kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}
DROPOUT = {"dropout_op": nn.Dropout3d, "dropout_op_kwargs": {"p": 0.3, "inplace": True}}
CHANGES: dict[str, dict[str, Any]] = {
    "as planned": {},
    "anisotropic": ANISOTROPIC,
    "batch norm": {"norm_op": nn.BatchNorm3d},
    "dropout": DROPOUT,
    "not in place": {"nonlin": nn.GELU, "nonlin_kwargs": {}},
    "one output": {"deep_supervision": False},
}


def arguments(kind: str, dim: int = 3, **changes: Any) -> dict[str, Any]:
    found = {**isotropic([4, 6, 8], dim, deep_supervision=True), **changes}
    if kind == "resenc":
        del found["n_conv_per_stage"]
        found |= {"n_blocks_per_stage": [1, 3, 2], "n_conv_per_stage_decoder": [1, 1]}
    return found


def pair(kind: str, dim: int = 3, options: dict[str, Any] | None = None, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """The host's network and ours with its weights."""
    host_class, our_class = NETWORKS[kind]
    values = arguments(kind, dim, **changes)
    torch.manual_seed(0)
    host = host_class(2, num_classes=3, **values)
    ours = our_class(2, num_classes=3, **(options or {}), **values)
    ours.load_state_dict(host.state_dict())
    return host, ours


def image(dim: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 2, *SIZE[-dim:])


def step(network: Callable[..., Any], x: Tensor, dtype: torch.dtype | None = None, then: Any = None) -> list[Tensor]:
    """Outputs of a step of training, and a gradient for each parameter that has one."""
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        outputs = network(x)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        loss = sum(z.float().softmax(1)[:, 0].square().mean() for z in outputs)
    if then is not None:
        then()
    parameters = [p for p in network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [z.detach() for z in outputs] + [g for g in gradients if g is not None]


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(wanted)
    largest = max(float(tensor.abs().max()) for tensor in wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * largest)


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the two finest stages of `image` run sample by sample."""
    monkeypatch.setattr(levels, "GROUP_ELEMENTS", 700)


@pytest.mark.parametrize("recompute", ["stages", "norms", "finest"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_and_statistics_are_those_of_the_host_bit_for_bit(kind: str, change: str, recompute: str) -> None:
    options = {"recompute": recompute, "samples_apart": False}
    host, ours = pair(kind, options=options, **CHANGES[change])
    assert_equal(step(ours, image()), step(host, image()))
    assert_equal(list(ours.buffers()), list(host.buffers()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_under_autocast_are_those_of_the_host_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    host, ours = pair(kind, 2, {"samples_apart": False})
    assert_equal(step(ours, image(2), dtype), step(host, image(2), dtype))


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("recompute", ["stages", "norms", "finest"])
@pytest.mark.parametrize(("dim", "change"), [(2, "as planned"), (3, "anisotropic"), (3, "one output")])
@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_of_samples_apart_are_those_of_the_host(kind: str, dim: int, change: str, recompute: str) -> None:
    host, ours = pair(kind, dim, {"recompute": recompute}, **CHANGES[change])
    sizes = []
    first = next(part for part in ours.modules() if isinstance(part, (nn.Conv2d, nn.Conv3d)))
    first.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    assert_close(step(ours, image(dim)), step(host, image(dim)))
    assert set(sizes) == {1}


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("options", [{"fusion": "post"}, {"fusion": "pre"}, {"prior_resampling": "max"}])
def test_gradients_of_a_network_with_a_prior_are_those_without_checkpointing(options: dict[str, Any]) -> None:
    values = {**arguments("plain"), **options, "prior_channels": 1}
    plain, ours = PostConcatUNet(2, 3, **values), PostConcatUNet(2, 3, recompute="stages", **values)
    ours.load_state_dict(plain.state_dict())
    assert_close(step(ours, image()), step(plain, image()))
    assert_close(step(ours, image(), torch.bfloat16), step(plain, image(), torch.bfloat16), 0.02)


def test_gradients_of_both_branches_are_those_without_checkpointing() -> None:
    plain, ours = DualMeUNet(2, 3, **arguments("resenc")), DualMeUNet(2, 3, recompute="norms", **arguments("resenc"))
    ours.load_state_dict(plain.state_dict())
    assert all(isinstance(branch, CheckpointedResidualEncoderUNet) for branch in ours.branches)
    assert_equal(step(ours, image()), step(plain, image()))


def test_samples_run_in_four_groups_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "GROUP_ELEMENTS", 1)
    _, ours = pair("plain", 2)
    maps = ours.recomputation.encode(ours.encoder, torch.randn(10, 2, 8, 8))
    assert [len(group) for group in maps[0]] == [3, 3, 3, 1]


def test_norm_over_the_batch_keeps_samples_together() -> None:
    _, ours = pair("plain", norm_op=nn.BatchNorm3d)
    assert not ours.recomputation.apart
    _, ours = pair("plain", norm_op_kwargs={"affine": True, "track_running_stats": True})
    assert not ours.recomputation.apart


def test_without_a_norm_what_is_kept_is_not_changed_in_place() -> None:
    host, ours = pair("plain", options={"samples_apart": False}, norm_op=None, norm_op_kwargs=None)
    assert_equal(step(ours, image()), step(host, image()))


@pytest.mark.parametrize("block", [BasicBlockD, BottleneckD])
def test_stochastic_depth_draws_and_counts_as_in_the_host(block: type[nn.Module]) -> None:
    changes = {"block": block, "bottleneck_channels": 2 if block is BottleneckD else None}
    host, ours = pair("resenc", options={"samples_apart": False}, **changes)
    for network in (host, ours):
        for part in network.modules():
            if isinstance(part, block):
                part.apply_stochastic_depth, part.drop_path = True, DropPath(0.5)
    wanted = step(host, image())
    assert_equal(step(ours, image()), wanted)


def test_evaluation_is_the_hosts() -> None:
    host, ours = pair("resenc", norm_op=nn.BatchNorm3d)
    for network in (host, ours):
        network.eval()
    assert_equal(step(ours, image()), step(host, image()))
    with torch.no_grad():
        assert_equal(ours.train()(image()), host.train()(image()))


def test_modes_are_those_of_the_forward_pass() -> None:
    host, ours = pair("plain", options={"samples_apart": False}, **DROPOUT)
    assert_equal(step(ours, image(), then=ours.eval), step(host, image()))


def test_random_leaky_relu_is_not_recomputed() -> None:
    host, ours = pair("plain", nonlin=nn.RReLU, nonlin_kwargs={"inplace": True})
    assert_equal(step(ours, image()), step(host, image()))


def test_who_hooks_a_layer_is_called_with_it() -> None:
    host, ours = pair("plain", options={"samples_apart": False})
    for network in (host, ours):
        network.encoder.stages[1][0].convs[0].register_forward_hook(lambda module, inputs, output: output.detach())
    wanted = step(host, image())
    assert_equal(step(ours, image()), wanted)
    assert len(wanted) < len(step(pair("plain")[0], image()))


def test_frozen_weights_get_no_gradients() -> None:
    host, ours = pair("resenc", options={"samples_apart": False})
    for network in (host, ours):
        network.encoder.requires_grad_(False)
    assert_equal(step(ours, image()), step(host, image()))


def test_twice_backward_through_one_pass_adds_twice() -> None:
    _, ours = pair("plain")
    loss = sum(z.square().mean() for z in ours(image()))
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in ours.parameters()]
    loss.backward()
    for parameter, gradient in zip(ours.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_a_copy_of_whose_levels_some_are_missing_runs() -> None:
    """As meU-net's expanded pass makes it, also where a stage has no block left."""
    host, ours = pair("plain", options={"samples_apart": False}, n_conv_per_stage=[2, 1, 2])
    results = []
    for network in (host, ours):
        twin = copy.copy(network)
        twin._modules = dict(network._modules)
        twin.encoder, twin.decoder = copy.deepcopy(network.encoder), copy.deepcopy(network.decoder)
        _, second, third = twin.encoder.stages
        twin.encoder.stages = nn.Sequential(second[0].convs[1:], third)
        for name in ("stages", "transpconvs", "seg_layers"):
            setattr(twin.decoder, name, getattr(twin.decoder, name)[:-1])
        torch.manual_seed(3)
        results.append(step(twin, torch.randn(2, 6, 4, 8, 6)))
    assert_equal(*results)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_apart": True, "norm_op": nn.BatchNorm3d}, "samples_apart needs a norm .* got BatchNorm3d"),
        ({"recompute": "all"}, "recompute must be .* got 'all'"),
        (
            {"n_stages": 1, "features_per_stage": [4], "kernel_sizes": [3], "strides": [1], "n_conv_per_stage": [1]}
            | {"n_conv_per_stage_decoder": []},
            "at least 2 stages, got n_stages=1",
        ),
    ],
)
def test_impossible_options_are_refused_with_rule_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointedPlainConvUNet(2, num_classes=3, **{**arguments("plain"), **changes})


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """A network that is compiled into one graph, or fails."""

    def __init__(self, network: nn.Module, backend: str) -> None:
        self.parameters = network.parameters
        self._run = torch.compile(network, backend=backend, fullgraph=True)

    def __call__(self, x: Tensor) -> Any:
        return self._run(x)


INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


@pytest.mark.usefixtures("one_by_one", "fresh_compiler")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler, about the machine
@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize(
    ("kind", "options", "changes"),
    [
        ("plain", {}, {}),
        ("plain", {}, {"norm_op": nn.BatchNorm3d}),
        pytest.param("resenc", {}, {}, marks=pytest.mark.slow),
        ("plain", {"recompute": "finest"}, {}),
        pytest.param("plain", {"recompute": "norms"}, {}, marks=pytest.mark.slow),
        pytest.param("plain", {"samples_apart": False}, {}, marks=pytest.mark.slow),
    ],
)
def test_compiles_into_one_graph_of_the_same_gradients(
    kind: str, options: dict[str, Any], changes: dict[str, Any], backend: str
) -> None:
    _, ours = pair(kind, options=options, **changes)
    eager = copy.deepcopy(ours)
    assert_close(step(Compiled(ours, backend), image()), step(eager, image()))
    for mine, theirs in zip(ours.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_a_checkpoint_keeps_holds_no_feature_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept maps are those between levels; a function that closes over others would keep them."""
    _, ours = pair("plain", options={"samples_apart": False})
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(image())
    sizes = {tuple(t.shape) for t in kept if t.dim() == 5 and len(t) == 3}
    assert sizes == {(3, 2, 8, 16, 12), (3, 4, 8, 16, 12), (3, 6, 4, 8, 6), (3, 8, 2, 4, 3)}


def test_planted_error_in_a_residual_block_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    host, ours = pair("resenc", options={"samples_apart": False})
    monkeypatch.setattr(stages._Plus, "__call__", lambda self, x: x)
    with pytest.raises(AssertionError):
        assert_equal(step(ours, image()), step(host, image()))
