"""The reversible engine against plain autograd: `reversible=False` keeps everything and shares the weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnunet_ext.architectures.reversible.chain import Chain
from nnunet_ext.architectures.reversible.coupling import AdditiveCoupling
from nnunet_ext.architectures.reversible.sequence import ReversibleSequence
from nnunet_ext.memory.network import measure_step

CONVS = {2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def shift(channels: int, dim: int = 3, extra: nn.Module | None = None, groups: int = 2) -> nn.Module:
    layers = [nn.GroupNorm(groups, channels), nn.LeakyReLU(inplace=True), CONVS[dim](channels, channels, 3, padding=1)]
    return nn.Sequential(*layers, *([extra] if extra is not None else []))


def pair(n: int, channels: int = 8, dim: int = 3, extra=None, exact: bool = False, dtype=torch.float64, **options):
    """A reversible sequence and its twin that keeps everything, with equal weights."""
    torch.manual_seed(n)

    def half() -> nn.Module:
        return shift(channels // 2, dim, copy.deepcopy(extra))

    couplings = [AdditiveCoupling(half(), half(), exact) for _ in range(n)]
    ours = ReversibleSequence(couplings, **options).to(dtype)
    plain = ReversibleSequence(copy.deepcopy(couplings), reversible=False).to(dtype)
    return ours, plain


def image(channels: int = 8, dim: int = 3, dtype=torch.float64, batch: int = 2) -> Tensor:
    torch.manual_seed(99)
    return torch.randn(batch, channels, *(6, 5, 4)[:dim], dtype=dtype)


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of a nonlinear loss with respect to input and parameters."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    module(x).square().mean().backward()
    return [x.grad, *(p.grad for p in module.parameters())]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest of the relative errors; gradients that a norm makes zero count by their absolute error."""
    pairs = [(f.double(), e.double()) for f, e in zip(found, expected, strict=True)]
    return max(((f - e).norm() / e.norm().clamp_min(1e-5)).item() for f, e in pairs)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_inverse_recovers_input(dim: int, n: int) -> None:
    ours, _ = pair(n, dim=dim)
    x = image(dim=dim)
    with torch.no_grad():
        y = ours(x)
        torch.testing.assert_close(ours.inverse(y), x, rtol=0, atol=1e-12)
    assert (y - x).abs().max() > 0.1


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("n", [1, 2, 16])
def test_float64_gradients_equal_plain_autograd(dim: int, n: int) -> None:
    ours, plain = pair(n, dim=dim)
    x = image(dim=dim)
    assert relative_error(gradients(ours, x), gradients(plain, x)) <= 1e-10


@pytest.mark.parametrize("n", [1, 4, 16])
def test_float32_gradients_are_as_close_to_float64_as_plain_autograd(n: int) -> None:
    ours, plain = pair(n, dtype=torch.float32)
    x = image(dtype=torch.float32)
    truth = gradients(copy.deepcopy(plain).double(), x.double())
    ours_error = relative_error(gradients(ours, x), truth)
    plain_error = relative_error(gradients(plain, x), truth)
    assert ours_error <= max(2 * plain_error, 1e-5)


@pytest.mark.parametrize("n", [2, 64])
@pytest.mark.parametrize("autocast", [False, True])
def test_exact_mode_gradients_equal_plain_autograd_bit_for_bit(n: int, autocast: bool) -> None:
    ours, plain = pair(n, exact=True, dtype=torch.float32)
    x = image(dtype=torch.float32)
    found, expected = [], []
    for module, grads in ((ours, found), (plain, expected)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = module(leaf).square().mean()
        loss.backward()
        grads += [leaf.grad, *(p.grad for p in module.parameters())]
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_exact_mode_inverts_bit_for_bit_where_the_plain_scheme_drifts() -> None:
    x = torch.round(image(dtype=torch.float32) * 4096) / 4096
    errors = {}
    for exact in (True, False):
        ours, _ = pair(64, exact=exact, dtype=torch.float32)
        with torch.no_grad():
            errors[exact] = (ours.inverse(ours(x)) - x).abs().max().item()
    assert errors[True] == 0.0
    assert errors[False] > 0.0


def test_exact_mode_says_when_streams_leave_its_range() -> None:
    ours, _ = pair(1, exact=True, dtype=torch.float32)
    y = ours(image(dtype=torch.float32) * 1e4)
    with pytest.warns(UserWarning, match="streams below 4096, got"):
        y.sum().backward()


def test_exact_mode_refuses_half_precision_streams() -> None:
    ours, _ = pair(1, exact=True, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\.bfloat16"):
        ours(image(dtype=torch.bfloat16))


def test_exact_and_plain_couplings_do_not_mix() -> None:
    with pytest.raises(ValueError, match="all exact or all not"):
        ReversibleSequence([AdditiveCoupling(shift(4), shift(4), exact) for exact in (True, False)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward_outside_autocast_recomputes_in_the_dtype_of_the_forward_pass(dtype: torch.dtype) -> None:
    ours, _ = pair(2, dtype=torch.float32)
    seen: list[torch.dtype] = []
    ours.couplings[0].g[2].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=dtype):
        y = ours(image(dtype=torch.float32))
    y.sum().backward()
    assert seen == [dtype, dtype]
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, None])
@pytest.mark.parametrize("reversible", [True, False])
def test_streams_are_float32_inside_and_low_outside(
    dtype: torch.dtype, given: torch.dtype | None, reversible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pair(2, dtype=torch.float32)[not reversible]
    inside: set[torch.dtype] = set()
    run = AdditiveCoupling.forward

    def noted(self: AdditiveCoupling, *args: Any) -> Any:
        halves = run(self, *args)
        inside.update(half.dtype for half in (*args[:2], *halves))
        return halves

    monkeypatch.setattr(AdditiveCoupling, "forward", noted)
    x = image(dtype=given or dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = module(x)
    y.float().square().sum().backward()
    assert inside == {torch.float32}
    assert y.dtype == dtype
    assert x.grad.dtype == x.dtype


def test_autocast_cache_of_the_engine_does_not_cut_gradients_of_shared_weights() -> None:
    ours, plain = pair(1, dtype=torch.float32)
    found = []
    for module in (ours, plain):
        conv = module.couplings[0].f[2]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (module(image(dtype=torch.float32)).sum() * 0) + conv(image(4, dtype=torch.float32)).float().sum()
        loss.backward()
        found.append(conv.weight.grad)
    torch.testing.assert_close(*found)
    assert found[0].abs().sum() > 0


def test_input_that_needs_no_gradient_still_trains_the_weights() -> None:
    ours, plain = pair(2)
    x = image()
    for module in (ours, plain):
        module(x).square().mean().backward()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_input_and_output_may_feed_skips() -> None:
    ours, plain = pair(2)
    found = []
    for module in (ours, plain):
        x = image().requires_grad_()
        y = module(x)
        (y * x + y.exp().mean() + x.sum()).sum().backward()
        found.append(x.grad)
        torch.testing.assert_close(x, image())
    torch.testing.assert_close(*found)


def test_in_place_change_of_the_output_is_an_error_not_a_wrong_gradient() -> None:
    ours, _ = pair(1)
    y = ours(image())
    loss = y.mul_(2).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_change_of_weights_between_forward_and_backward_is_an_error() -> None:
    ours, _ = pair(1)
    loss = ours(image()).sum()
    with torch.no_grad():
        next(ours.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_shift_that_changes_its_input_in_place_is_refused() -> None:
    ours = ReversibleSequence([AdditiveCoupling(nn.LeakyReLU(inplace=True), nn.Conv3d(4, 4, 1))])
    with pytest.raises(RuntimeError, match="LeakyReLU changes its input in place"):
        ours(image(dtype=torch.float32))


def test_shift_that_changes_the_shape_is_refused() -> None:
    ours = ReversibleSequence([AdditiveCoupling(nn.Conv3d(4, 1, 1), nn.Conv3d(4, 4, 1))])
    with pytest.raises(ValueError, match=r"keep the shape .* got \(2, 1, 6, 5, 4\)"):
        ours(image(dtype=torch.float32))


def test_odd_channels_are_refused_with_the_shape() -> None:
    ours, _ = pair(1)
    with pytest.raises(ValueError, match=r"even number of channels, got 7 \(shape \(2, 7, 6, 5, 4\)\)"):
        ours(image(7))


@pytest.mark.parametrize("group_elements", [None, 8 * 120])
def test_dropout_is_recomputed_with_the_same_mask(group_elements: int | None) -> None:
    ours, plain = pair(3, extra=nn.Dropout(0.5), group_elements=group_elements)
    x = image(batch=1)  # one group: the generator is used in the same order
    found = []
    for module in (ours, plain):
        torch.manual_seed(5)
        found.append(gradients(module, x))
    assert relative_error(*found) <= 1e-10


def test_dropout_with_groups_of_samples_is_recomputed_with_the_same_mask() -> None:
    ours, _ = pair(2, extra=nn.Dropout(0.5), group_elements=1)
    x = image(batch=3).requires_grad_()
    weight = ours.couplings[0].f[2].weight
    step = 1e-6 * torch.randn_like(weight)

    def loss() -> Tensor:
        torch.manual_seed(5)
        return ours(x).square().mean()

    (slope,) = torch.autograd.grad(loss(), weight)
    before = loss().detach()
    with torch.no_grad():
        weight.add_(step)
    after = loss().detach()
    torch.testing.assert_close(after - before, (slope * step).sum(), rtol=1e-3, atol=0)


def test_custom_random_module_is_recomputed_with_the_same_numbers() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rand_like(x)

    ours, plain = pair(2, extra=Noise())
    found = []
    for module in (ours, plain):
        torch.manual_seed(5)
        found.append(gradients(module, image()))
    assert relative_error(*found) <= 1e-10


def test_backward_leaves_the_global_generator_alone() -> None:
    ours, _ = pair(2, extra=nn.Dropout(0.5))
    y = ours(image())
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dim", [2, 3])
def test_batch_norm_counts_a_step_once_with_equal_gradients(dim: int) -> None:
    ours, plain = pair(2, dim=dim, extra=BATCH_NORMS[dim](4))
    x = image(dim=dim)
    assert relative_error(gradients(ours, x), gradients(plain, x)) <= 1e-10
    for mine, theirs in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    assert all(m.num_batches_tracked == 1 for m in ours.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def test_tracked_instance_norm_counts_a_step_once() -> None:
    norm = nn.InstanceNorm3d(4, track_running_stats=True)
    ours, plain = pair(2, extra=norm)
    x = image()
    assert relative_error(gradients(ours, x), gradients(plain, x)) <= 1e-10
    for mine, theirs in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("group_elements", [1, 8 * 120, 2 * 8 * 120])
def test_groups_of_samples_change_nothing_but_memory(group_elements: int) -> None:
    ours, plain = pair(2, group_elements=group_elements)
    x = image(batch=5)
    assert relative_error(gradients(ours, x), gradients(plain, x)) <= 1e-10


def test_graph_can_be_walked_twice() -> None:
    ours, _ = pair(2)
    x = image().requires_grad_()
    loss = ours(x).square().sum()
    first = torch.autograd.grad(loss, [x, *ours.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *ours.parameters()])
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_gradients_accumulate_over_steps() -> None:
    ours, plain = pair(2)
    for module in (ours, plain):
        for scale in (1.0, 2.0):
            module(image() * scale).square().mean().backward()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_frozen_shift_passes_gradients_on_and_gets_none() -> None:
    ours, plain = pair(2)
    for module in (ours, plain):
        module.couplings[1].f.requires_grad_(False)
    x = image()
    found = [[g for g in gradients(module, x) if g is not None] for module in (ours, plain)]
    assert len(found[0]) < 1 + len(list(ours.parameters()))
    assert relative_error(*found) <= 1e-10


def test_all_weights_frozen_still_gives_the_gradient_of_the_input() -> None:
    ours, plain = pair(2)
    grads = []
    for module in (ours, plain):
        module.requires_grad_(False)
        x = image().requires_grad_()
        module(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_weights_shared_between_couplings_receive_the_sum() -> None:
    f, g = shift(4).double(), shift(4).double()
    ours = ReversibleSequence([AdditiveCoupling(f, g), AdditiveCoupling(g, f)])
    plain = ReversibleSequence([AdditiveCoupling(f, g), AdditiveCoupling(g, f)], reversible=False)
    expected = gradients(plain, image())
    assert relative_error(gradients(ours, image()), [e.clone() for e in expected]) <= 1e-10


def test_parameter_hooks_fire_once() -> None:
    ours, _ = pair(3)
    counts = dict.fromkeys(range(len(list(ours.parameters()))), 0)
    for i, parameter in enumerate(ours.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda _, i=i: counts.update({i: counts[i] + 1}))
    ours(image()).sum().backward()
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(context) -> None:
    ours, _ = pair(2)
    expected = ours(image()).detach()
    with context():
        torch.testing.assert_close(ours(image()), expected)


def test_evaluation_mode_with_gradients_uses_running_statistics() -> None:
    ours, plain = pair(2, extra=nn.BatchNorm3d(4))
    for module in (ours, plain):
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.fill_(0.7)
        module.eval()
    assert relative_error(gradients(ours, image()), gradients(plain, image())) <= 1e-10
    assert all(b.eq(0.7).all() for b in ours.buffers() if b.is_floating_point())


def test_upstream_gradient_stays_unchanged() -> None:
    ours, _ = pair(2)
    x = image().requires_grad_()
    upstream = torch.ones_like(x)
    ours(x).backward(upstream)
    assert torch.equal(upstream, torch.ones_like(x))


def test_compiled_sequence_has_equal_gradients_and_one_graph_break() -> None:
    ours, plain = pair(2)
    explained = torch._dynamo.explain(ours)(image())
    assert explained.graph_break_count <= 1
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    assert relative_error(gradients(compiled, image()), gradients(plain, image())) <= 1e-10


def test_a_chain_has_a_hash_before_it_has_fields() -> None:
    # PyTorch before 2.12 takes it while it traces `Chain(...)`.
    assert isinstance(hash(Chain.__new__(Chain)), int)


def stack(n: int, reversible: bool = True) -> ReversibleSequence:
    couplings = [AdditiveCoupling(shift(16, groups=4), shift(16, groups=4)) for _ in range(n)]
    return ReversibleSequence(couplings, reversible=reversible)


OUTPUT_BYTES = 32 * 48**3 * 4


@pytest.mark.parametrize("n", [1, 2, 16, 64])
def test_held_bytes_are_the_output_at_every_depth(n: int) -> None:
    assert measure_step(lambda: stack(n), 32, (48,) * 3, batch_size=1).held == OUTPUT_BYTES


@pytest.mark.parametrize("n", [1, 16, 64])
def test_peak_is_at_most_six_outputs_at_every_depth(n: int) -> None:
    memory = measure_step(lambda: stack(n), 32, (48,) * 3, batch_size=1)
    assert memory.peak - memory.parameters <= 6 * OUTPUT_BYTES


def test_plain_autograd_holds_more_with_depth() -> None:
    held = [measure_step(lambda n=n: stack(n, reversible=False), 32, (48,) * 3, 1).held for n in (1, 2)]
    assert held[1] - held[0] > OUTPUT_BYTES


def test_training_step_costs_four_thirds_of_the_flops() -> None:
    flops = {}
    for reversible in (True, False):
        module = stack(2, reversible)
        x = torch.randn(1, 32, 8, 8, 8, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        flops[reversible] = counter.get_total_flops()
    assert 3 * flops[True] == 4 * flops[False]


def test_nothing_warns_in_a_training_step() -> None:
    ours, _ = pair(2, exact=True, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(ours, image(dtype=torch.float32))
