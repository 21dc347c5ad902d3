"""meU-net in one pass against the whole network on the large patch, with its finest level cut by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.nn.modules.instancenorm import _InstanceNorm

from nnunet_ext.architectures.checkpointed.unet import CheckpointedPlainConvUNet
from nnunet_ext.architectures.expanded import partial_pass
from nnunet_ext.architectures.expanded.one_pass import OnePass, Region
from nnunet_ext.architectures.expanded.statistics import SharedStatistics
from nnunet_ext.architectures.invertible_unet import InvertibleUNet
from nnunet_ext.architectures.reversible_unet import ReversibleUNet
from nnunet_ext.memory.network import measure_step
from tests.architectures.expanded.test_partial_pass import CASES, boundary, build
from tests.contract.plans import DEFAULT, PATCHES, arguments, isotropic


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def patches(case: tuple[str, str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """P and kP."""
    small = tuple(PATCHES[case[0]])
    return small, tuple(3 * n // 2 for n in small)


def image(case: tuple[str, str], batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 2, *patches(case)[1], dtype=torch.float64)


def one_pass(case: tuple[str, str], network: nn.Module, **options: bool) -> OnePass:
    return OnePass(network, lambda _: patches(case)[0], **options)


def centre(case: tuple[str, str], pass_: OnePass) -> Region:
    return pass_.centre(patches(case)[1])


def cut_outside(x: Tensor, region: Region) -> Tensor:
    """`x` with a gradient in the region only."""
    inside = torch.zeros(x.shape[2:], dtype=torch.bool)
    inside[region.slices[2:]] = True
    return torch.where(inside, x, x.detach())


class StandsForWhole(nn.Module):
    """Instance norm written out: m and s of the whole, differentiated as if the voxels of P were the whole."""

    def __init__(self, norm: Any, region: Callable[[Tensor], Region]) -> None:
        super().__init__()
        self.norm, self.region = norm, region

    def forward(self, x: Tensor) -> Tensor:
        axes = list(range(2, x.ndim))
        inside = self.region(x).of(x)

        def of_whole(f: Callable[[Tensor], Tensor]) -> Tensor:
            part = f(inside).mean(axes, keepdim=True)
            return f(x.detach()).mean(axes, keepdim=True) + part - part.detach()

        mean = of_whole(lambda values: values)
        var = of_whole(torch.square) - mean.square()
        shape = [1, -1, *[1] * len(axes)]
        z = (x - mean) / (var + self.norm.eps).sqrt()
        return z * self.norm.weight.view(shape) + self.norm.bias.view(shape)


def finest(network: Any) -> tuple[list[nn.Module], nn.Module]:
    """What the pass runs on P: up to the first block of level 2, and the finest level of the decoder."""
    if isinstance(network, ReversibleUNet):
        encoder = network.encoder
        return [encoder.transitions[0], encoder.stages[0], encoder.transitions[1]], network.decoder.stages[-1]
    stem = getattr(network.encoder, "stem", None)
    first = [] if stem is None else [stem]
    return [*first, network.encoder.stages[0], boundary(network)], network.decoder.stages[-1]


def swap_norms(module: Any, region: Callable[[Tensor], Region]) -> None:
    for name, child in list(module._modules.items()):
        if isinstance(child, _InstanceNorm):
            module._modules[name] = StandsForWhole(child, region)
        elif child is not None:
            swap_norms(child, region)


def network_cut_by_hand(case: tuple[str, str], network: Any, pass_: OnePass, whole: Region) -> list[Tensor]:
    """Logits of the network on kP by plain autograd, the full-resolution ones of P, which is `whole`."""
    _, large = patches(case)
    if isinstance(network, ReversibleUNet):
        network.reversible = False
        for part in network.modules():
            if hasattr(part, "reversible"):
                part.reversible = False
    encoder, decoder = finest(network)

    def region(x: Tensor) -> Region:
        stride = [n // m for n, m in zip(large, x.shape[2:], strict=True)]
        return whole.coarser(stride)

    for module in (*encoder, decoder):
        swap_norms(module, region)
    encoder[-1].register_forward_hook(lambda m, given, y: cut_outside(y, region(y)))
    x = image(case)
    if isinstance(network, ReversibleUNet):  # the skip is added
        skip = encoder[1](encoder[0](x))
        below = encoder[2](skip)
        deep = partial_pass.ExpandedPass(network, deep_supervision=True)
        features: list[Tensor] = []
        hook = network.decoder.seg_layers[-2].register_forward_hook(lambda m, given, y: features.append(given[0]))
        coarse = deep.deep(below)
        hook.remove()
        joined = network.decoder.transitions[-1](features[0]) + cut_by_rim(pass_, whole, skip, large)
        return [whole.of(network.decoder.seg_layers[-1](decoder(joined))), *coarse]
    channels = network.encoder.output_channels[0]

    def with_cut_skip(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        up, skip = given[0].split([given[0].shape[1] - channels, channels], dim=1)
        return (torch.cat([up, cut_by_rim(pass_, whole, skip, large)], dim=1),)

    decoder.register_forward_pre_hook(with_cut_skip)
    logits, *coarse = network(x)
    return [whole.of(logits), *coarse]


def cut_by_rim(pass_: OnePass, whole: Region, skip: Tensor, large: Sequence[int]) -> Tensor:
    """The skip reaches P through the convolutions of the decoder: its gradient is that of all voxels they see."""
    return cut_outside(skip, whole.widened(pass_._decoder_rim, pass_._stride, large))


def gradients(network: nn.Module, outputs: Sequence[Tensor]) -> dict[str, Tensor | None]:
    network.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    sum((output * torch.randn_like(output)).mean() for output in outputs).backward()
    return {name: p.grad for name, p in network.named_parameters()}


def test_logits_are_those_of_the_network_on_the_large_patch(case: tuple[str, str]) -> None:
    network = build(case).double()
    pass_ = one_pass(case, network, deep_supervision=True)
    expected = network(image(case))
    full, *coarse = pass_(image(case))
    torch.testing.assert_close(full, centre(case, pass_).of(expected[0]), rtol=1e-10, atol=1e-12)
    corner = Region(start=(0,) * (full.ndim - 2), size=patches(case)[0])
    torch.testing.assert_close(pass_(image(case), corner)[0], corner.of(expected[0]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(coarse, expected[1:], rtol=1e-10, atol=1e-12)
    only_second = one_pass(case, network)(image(case))[1:]
    torch.testing.assert_close(only_second, expected[1:2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("place", ["centre", "corner"])
def test_gradients_are_those_of_the_network_cut_by_hand(case: tuple[str, str], place: str) -> None:
    network = build(case).double()
    pass_ = one_pass(case, network, deep_supervision=True)
    part = centre(case, pass_)
    if place == "corner":
        part = replace(part, start=(0,) * len(part.size))
    full, *coarse = pass_(image(case), part)
    found = gradients(network, [full, *coarse])
    reference = build(case).double()
    expected = gradients(reference, network_cut_by_hand(case, reference, pass_, part))
    values = list(expected.values())
    assert len(found) == len(values)
    for (name, gradient), wanted in zip(found.items(), values, strict=True):
        assert gradient is not None, name
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10)


def test_statistics_of_the_centre_leave_the_forward_pass_of_the_large_patch() -> None:
    case = ("2d", "host")
    network = build(case).double()
    pass_ = one_pass(case, network, whole_statistics=False)
    full, *_ = pass_(image(case))
    expected = centre(case, pass_).of(network(image(case))[0])
    assert (full - expected).abs().max() > 1e-3


def test_samples_in_groups_give_the_same_logits_and_gradients(
    case: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[Any, dict[str, Tensor | None]]:
        network = build(case).double()
        full, *coarse = one_pass(case, network)(image(case, batch=3))
        return full, gradients(network, [full, *coarse])

    expected = run()
    monkeypatch.setattr(partial_pass, "GROUP_ELEMENTS", 1)
    torch.testing.assert_close(run(), expected, rtol=1e-8, atol=1e-10)


def test_weights_are_shared_and_the_network_stays_as_it_was(case: tuple[str, str]) -> None:
    network = build(case).double()
    names, expected = list(network.state_dict()), network(image(case))
    pass_ = one_pass(case, network)
    assert {id(p) for p in pass_.parameters()} == {id(p) for p in network.parameters()}
    pass_(image(case))
    assert list(network.state_dict()) == names
    torch.testing.assert_close(network(image(case)), expected, rtol=0, atol=0)


def test_the_centre_starts_where_a_voxel_of_level_2_does() -> None:
    network = build(("anisotropic", "host"))
    stride = network.decoder.transpconvs[-1].stride
    for whole, size in (((9, 34, 34), (8, 32, 32)), ((10, 38, 40), (7, 32, 32))):
        region = OnePass(network, lambda _, size=size: size).centre(whole)
        assert region.size == size
        assert all(start % s == 0 for start, s in zip(region.start, stride, strict=True))
        margins = [w - n - 2 * a for w, n, a in zip(whole, size, region.start, strict=True)]
        assert all(0 <= margin < 2 * s for margin, s in zip(margins, stride, strict=True))


def test_p_lies_anywhere_and_holds_the_middle_of_the_patch() -> None:
    pass_ = OnePass(build(("3d", "host")), lambda _: (16, 16, 16))
    torch.manual_seed(0)
    places = [pass_.anywhere((28, 28, 28)) for _ in range(300)]
    starts = [start for place in places for start in place.start]
    assert set(starts) == set(range(0, 14, 2))
    # At the border as often as its middle falls where P does not fit.
    assert starts.count(0) / len(starts) == pytest.approx(10 / 28, abs=0.06)
    assert all(start <= 14 < start + 16 for start in starts)
    assert len({len({*place.start}) for place in places}) == 3  # axis by axis


def test_feature_maps_have_one_size_wherever_p_lies() -> None:
    whole, rim, steps = (28, 28), (5, 5), (2, 2)
    sizes = {
        Region(start=(a, b), size=(16, 16)).widened(rim, steps, whole).size for a in range(0, 14, 2) for b in (0, 12)
    }
    assert sizes == {(28, 28)}
    place = Region(start=(0, 12), size=(8, 8)).widened((3, 3), steps, whole)
    assert place == Region(start=(0, 8), size=(16, 16))


def test_batch_norm_counts_its_statistics_once_in_the_finest_level() -> None:
    network = build(("3d", "host"), norm_op=nn.BatchNorm3d).double()
    one_pass(("3d", "host"), network)(image(("3d", "host")))
    counts = {
        name: int(norm.num_batches_tracked)
        for name, norm in network.named_modules()
        if isinstance(norm, nn.BatchNorm3d) and "all_modules" not in name
    }
    assert set(counts.values()) == {1}, counts


@pytest.mark.parametrize("kind", ["host", "checkpointed"])
def test_compiled_it_gives_the_same_logits_and_gradients(kind: str) -> None:
    case = ("2d", kind)

    def run(backend: Any) -> tuple[Any, dict[str, Tensor | None]]:
        network = build(case).double()
        pass_ = one_pass(case, network)
        if backend is not None:
            pass_.compile_levels(backend=backend)
        full, *coarse = pass_(image(case))
        return full, gradients(network, [full, *coarse])

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    expected = run(None)
    torch.testing.assert_close(run(counter), expected, rtol=1e-8, atol=1e-10)
    assert counter.frame_count > 0


def test_networks_that_can_not_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match="use nnU-Net's own networks or ReversibleUNet"):
        OnePass(InvertibleUNet(1, 2, **arguments("3d")), lambda size: size)


@pytest.mark.parametrize("inplace", [False, True])
def test_norm_of_the_centre_is_instance_norm_where_the_centre_is_all(inplace: bool) -> None:
    torch.manual_seed(0)
    norm = nn.InstanceNorm3d(3, affine=True).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    shared = SharedStatistics(nn.Sequential(norm, nn.LeakyReLU(inplace=inplace)))
    shared.of_whole(x.detach())
    shared.use([shared.found()], {(4, 5, 6): torch.ones(1, 1, 4, 5, 6)})
    weight = torch.randn_like(x)
    wanted = [x, norm.weight, norm.bias]
    found = torch.autograd.grad((shared.of_part(x) * weight).sum(), wanted)
    expected = torch.autograd.grad((functional.leaky_relu(norm(x)) * weight).sum(), wanted)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_norm_of_the_centre_keeps_only_its_input_and_its_dtype() -> None:
    norm = nn.InstanceNorm3d(4, affine=True)
    shared = SharedStatistics(nn.Sequential(norm))
    x = torch.randn(2, 4, 8, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    shared.of_whole(x.detach())
    shared.use([shared.found()], {(8, 8, 8): torch.ones(1, 1, 8, 8, 8)})
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = shared.of_part(x)
    assert y.dtype == torch.bfloat16
    assert sum(t.numel() for t in kept) <= x.numel() + 8**3 + 4 * 2 * 4
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("kind", "bound"), [(PlainConvUNet, 0.50), (CheckpointedPlainConvUNet, 0.35)])
def test_a_step_in_float16_peaks_far_below_the_network_on_the_large_patch(kind: type, bound: float) -> None:
    def network(kind: type) -> Any:
        return kind(1, num_classes=3, **isotropic(DEFAULT, deep_supervision=True))

    def step() -> OnePass:
        return OnePass(network(kind), lambda _: [128] * 3, deep_supervision=True)

    large = measure_step(lambda: network(PlainConvUNet), 1, [192] * 3, 2, torch.float16).peak
    assert measure_step(step, 1, [192] * 3, 2, torch.float16).peak <= bound * large
