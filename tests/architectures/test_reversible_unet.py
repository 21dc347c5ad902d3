"""ReversibleUNet: what the contract over all architectures does not ask, and its memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_ext.architectures.reversible_unet import ReversibleUNet
from nnunet_ext.memory.network import StepMemory, measure_step
from nnunet_ext.memory.tracker import GIB
from tests.contract.plans import DEFAULT, isotropic

arguments = partial(isotropic, deep_supervision=True)
ANISOTROPIC = {"kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}


def step(network: nn.Module, x: torch.Tensor, autocast: bool = False) -> list[torch.Tensor]:
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = network(x)
    sum(output.to(torch.promote_types(output.dtype, torch.float32)).square().mean() for output in outputs).backward()
    return [p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize(
    ("dim", "changes"),
    [
        (2, {}),
        (3, {}),
        (3, ANISOTROPIC),
        (3, {"norm_op": nn.BatchNorm3d}),
        (3, {"norm_op": None, "norm_op_kwargs": None}),
        (3, {"blocks_per_stage": [1, 2, 5]}),
        (3, {"preactivation": False}),
        (3, {"conv_bias": False, "nonlin": nn.GELU, "nonlin_kwargs": {}}),
    ],
)
def test_float64_gradients_equal_the_network_without_reversibility(dim: int, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours = ReversibleUNet(2, 3, **arguments([4, 6, 8], dim, **changes)).double()
    plain = ReversibleUNet(2, 3, reversible=False, **arguments([4, 6, 8], dim, **changes)).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(3, 2, *(8, 16, 12)[:dim], dtype=torch.float64)
    for mine, theirs in zip(step(ours, x), step(plain, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_exact_mode_equals_the_network_without_reversibility_bit_for_bit(autocast: bool) -> None:
    torch.manual_seed(0)
    values = arguments([4, 6, 8], exact=True, blocks_per_stage=8)
    ours, plain = ReversibleUNet(1, 3, **values), ReversibleUNet(1, 3, reversible=False, **values)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(1, 1, 8, 16, 12)  # one sample: the forward pass is the same sequence of kernels
    pairs = zip(step(ours, x, autocast), step(plain, x, autocast), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_network_cast_as_a_whole_has_the_gradients_of_plain_autograd(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    ours, plain = (ReversibleUNet(1, 3, reversible=r, **arguments([4, 6, 8])).to(dtype) for r in (True, False))
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 1, 8, 16, 12, dtype=dtype)
    mine, theirs = (torch.cat([g.flatten() for g in step(network, x, autocast)]) for network in (ours, plain))
    assert mine.dtype == dtype
    assert (mine - theirs).norm() <= (1e-10 if dtype == torch.float64 else 0.05) * theirs.norm()


def test_depth_comes_from_default_and_from_resenc_plans() -> None:
    values = arguments([4, 6, 8], n_conv_per_stage=[1, 2, 3], n_conv_per_stage_decoder=[5, 4])
    resenc = {**values, "n_blocks_per_stage": values["n_conv_per_stage"]}
    del resenc["n_conv_per_stage"]
    for network in (ReversibleUNet(1, 2, **values), ReversibleUNet(1, 2, **resenc)):
        assert [len(stage.couplings) for stage in network.encoder.stages] == [1, 2, 3]
        assert [len(stage.couplings) for stage in network.decoder.stages] == [5, 4]


def test_blocks_per_stage_overrides_the_plans_per_resolution() -> None:
    network = ReversibleUNet(1, 2, **arguments([4, 6, 8], blocks_per_stage=[1, 2, 3]))
    assert [len(stage.couplings) for stage in network.encoder.stages] == [1, 2, 3]
    assert [len(stage.couplings) for stage in network.decoder.stages] == [2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features_per_stage": [4, 7, 8]}, "stage 1 has 7 features; use 6 or 8"),
        ({"features_per_stage": [4, 6]}, r"features_per_stage needs one number or 3 of them .* got \[4, 6\]"),
        ({"n_stages": 1}, "at least 2 stages, got n_stages=1"),
        ({"conv_op": nn.Conv2d, "norm_op": None}, "need 2 numbers per stage for Conv2d"),
        ({"kernel_sizes": 2}, r"Kernels must be odd .* stage 0 has kernel size \[2, 2, 2\]"),
        ({"n_blocks_per_stage": [1, 1, 1]}, "either n_conv_per_stage"),
        ({"n_conv_per_stage": None}, "either n_conv_per_stage"),
        ({"blocks_per_stage": 0}, "at least one block"),
        ({"blocks_per_stage": [1, 2]}, r"blocks_per_stage needs one number or 3 of them .* got \[1, 2\]"),
    ],
)
def test_impossible_plans_are_refused_with_rule_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReversibleUNet(1, 2, **arguments([4, 6, 8], **changes))


def test_norms_over_the_batch_are_not_recomputed_in_groups() -> None:
    batch, instance = (
        ReversibleUNet(1, 2, **arguments([4, 6], norm_op=n)) for n in (nn.BatchNorm3d, nn.InstanceNorm3d)
    )
    x = torch.empty(9, 1, 128, 128, 128, device="meta")
    assert batch.chain().groups(x) == [slice(0, 9)]
    assert instance.chain().groups(x) == [slice(0, 3), slice(3, 6), slice(6, 9)]  # no more than four


def test_image_and_its_gradient_pass_through_the_groups() -> None:
    torch.manual_seed(0)
    ours = ReversibleUNet(1, 3, **arguments([4, 6, 8])).double()
    plain = ReversibleUNet(1, 3, reversible=False, **arguments([4, 6, 8])).double()
    plain.load_state_dict(ours.state_dict())
    ours.group_elements = 1
    found = []
    for network in (ours, plain):
        x = torch.linspace(-1, 1, 5 * 8**3, dtype=torch.float64).view(5, 1, 8, 8, 8).requires_grad_()
        found.append([*[x, *step(network, x)][1:], x.grad])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def reversible_memory(blocks: int, **changes: Any) -> StepMemory:
    values = arguments(DEFAULT, blocks_per_stage=blocks, **changes)
    return measure_step(lambda: ReversibleUNet(1, 3, **values), 1, (128,) * 3)


@pytest.fixture(scope="module")
def default_memory() -> StepMemory:
    return measure_step(lambda: PlainConvUNet(1, num_classes=3, **arguments(DEFAULT)), 1, (128,) * 3)


def test_tracker_gives_the_known_figures_of_default_nnunet(default_memory: StepMemory) -> None:
    assert default_memory.held / GIB == pytest.approx(6.71, rel=0.01)
    assert default_memory.peak / GIB == pytest.approx(8.79, rel=0.02)


@pytest.mark.parametrize("blocks", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_held_and_peak_at_full_size_do_not_depend_on_depth(blocks: int, default_memory: StepMemory) -> None:
    memory = reversible_memory(blocks)
    assert memory.held / GIB <= 0.75
    assert memory.peak <= 0.26 * default_memory.peak


def test_mixed_precision_halves_what_is_kept() -> None:
    float32, low = (
        measure_step(lambda: ReversibleUNet(1, 3, **arguments(DEFAULT)), 1, (128,) * 3, 2, dtype)
        for dtype in (None, torch.bfloat16)
    )
    # 16 bits and 8 of rounding error instead of 32; logits are a part of both.
    assert low.held <= 0.8 * float32.held
    assert low.peak <= 0.8 * float32.peak


def test_without_reversibility_depth_costs_memory() -> None:
    shallow, deep = (reversible_memory(blocks, reversible=False).held for blocks in (2, 4))
    assert deep > 1.4 * shallow
