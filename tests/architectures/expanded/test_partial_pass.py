"""The expanded pass of meU-net against the whole network, with its finest level cut off by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_ext.architectures.checkpointed.unet import CheckpointedPlainConvUNet, CheckpointedResidualEncoderUNet
from nnunet_ext.architectures.expanded import partial_pass
from nnunet_ext.architectures.expanded.partial_pass import ExpandedPass, centre_crop, downsample_labels
from nnunet_ext.architectures.faster_fusion_unet import FasterFusionUNet
from nnunet_ext.architectures.invertible_unet import InvertibleUNet
from nnunet_ext.architectures.partially_invertible_unet import PartiallyInvertibleUNet
from nnunet_ext.architectures.reversible_unet import ReversibleUNet
from nnunet_ext.memory.network import measure_step
from nnunet_ext.memory.tracker import StorageTracker
from nnunet_ext.trainers.passes import TwoPasses
from tests.contract.plans import DEFAULT, PATCHES, arguments, isotropic, sizes

CASES = [(case, kind) for case in PATCHES for kind in ("host", "reversible")] + [
    ("3d", "faster_fusion"),
    ("anisotropic", "checkpointed"),
    ("resenc", "checkpointed"),
]


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def build(case: tuple[str, str], **changes: Any) -> nn.Module:
    sizes, kind = case
    host = ResidualEncoderUNet if sizes == "resenc" else PlainConvUNet
    checkpointed = CheckpointedResidualEncoderUNet if sizes == "resenc" else CheckpointedPlainConvUNet
    networks = {"host": host, "checkpointed": checkpointed, "reversible": ReversibleUNet}
    network_class = {**networks, "faster_fusion": FasterFusionUNet}[kind]
    torch.manual_seed(0)
    options = {**arguments(sizes), "deep_supervision": True, **changes}
    network = network_class(input_channels=2, num_classes=3, **options)
    network.apply(network.initialize)
    with torch.no_grad():  # away from the zeros that ResEnc's last norms start with
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.train()


def image(case: tuple[str, str], batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 2, *PATCHES[case[0]])


def boundary(network: nn.Module) -> nn.Module:
    """The last module that runs without gradient."""
    if isinstance(network, ReversibleUNet):
        return network.encoder.transitions[1]
    stage = network.encoder.stages[1]
    return stage.blocks[0] if hasattr(stage, "blocks") else stage[0].convs[0]


def cut_logits(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Logits of all levels but the finest, from the whole network, whose graph stays cut at the boundary."""
    if isinstance(network, ReversibleUNet):
        network.reversible = False  # plain autograd, which the hook can cut
    boundary(network).register_forward_hook(lambda module, given, result: result.detach())
    return network(x)[1:]


def gradients(network: nn.Module, outputs: Any) -> dict[str, Tensor | None]:
    network.zero_grad(set_to_none=True)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    sum(output.float().square().mean() for output in outputs).backward()
    return {name: p.grad for name, p in network.named_parameters()}


def test_logits_are_exactly_those_of_the_second_level(case: tuple[str, str]) -> None:
    network = build(case)
    for supervised in (True, False):  # as nnU-Net switches it
        network.decoder.deep_supervision = supervised
        found = ExpandedPass(network)(image(case))
        network.decoder.deep_supervision = True
        torch.testing.assert_close(found, network(image(case))[1], rtol=0, atol=0)


def test_deep_supervision_gives_all_levels_from_the_second_on(case: tuple[str, str]) -> None:
    network = build(case)
    expected = network(image(case))[1:]
    torch.testing.assert_close(ExpandedPass(network, deep_supervision=True)(image(case)), expected, rtol=0, atol=0)
    assert len(network(image(case))) == len(expected) + 1


def test_gradients_are_those_of_the_network_cut_by_hand(case: tuple[str, str]) -> None:
    network = build(case).double()
    x = image(case).double()
    found = gradients(network, ExpandedPass(network)(x))
    expected = gradients(network, cut_logits(network, x)[0])
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        if wanted is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-12)


def test_only_the_finest_level_and_the_way_out_of_it_get_no_gradient(case: tuple[str, str]) -> None:
    network = build(case)
    found = gradients(network, ExpandedPass(network)(image(case)))
    without = {name for name, gradient in found.items() if gradient is None}
    finest = ("encoder.stem.", "encoder.stages.0.", "encoder.transitions.0.")
    inside = {id(p) for p in boundary(network).parameters()}
    way_out = {name for name, p in network.named_parameters() if id(p) in inside}
    last = tuple(f"decoder.{part}.1." for part in ("stages", "transpconvs", "transitions", "seg_layers"))
    assert without == {name for name in found if name.startswith((*finest, *last))} | way_out
    assert way_out
    assert all(g.isfinite().all() and g.any() for name, g in found.items() if g is not None and "bias" not in name)


def test_weights_are_shared_and_the_network_stays_as_it_was(case: tuple[str, str]) -> None:
    network = build(case)
    names, expected = list(network.state_dict()), network(image(case))
    expanded = ExpandedPass(network)
    assert {id(p) for p in expanded.parameters()} <= {id(p) for p in network.parameters()}
    assert list(network.state_dict()) == names
    torch.testing.assert_close(network(image(case)), expected, rtol=0, atol=0)


def test_samples_in_groups_give_the_same_logits(case: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(case).double()
    x = image(case, batch=5).double()
    expected = ExpandedPass(network)(x)
    monkeypatch.setattr(partial_pass, "GROUP_ELEMENTS", 1)
    torch.testing.assert_close(ExpandedPass(network)(x), expected, rtol=1e-10, atol=1e-12)


def test_batch_norm_of_the_finest_level_counts_no_statistics_and_keeps_its_mode() -> None:
    network = build(("3d", "host"), norm_op=nn.BatchNorm3d)
    frozen = network.encoder.stages[1][0].convs[1]
    frozen.eval()  # a mode of its own must stay
    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm3d) and "all_modules" not in n}
    ExpandedPass(network)(image(("3d", "host")))
    counted = {name for name, norm in norms.items() if norm.num_batches_tracked}
    shallow = {name for name in norms if name.startswith(("encoder.stages.0.", "encoder.stages.1.0.convs.0."))}
    assert shallow
    assert not counted & shallow
    assert "encoder.stages.2.0.convs.0.norm" in counted
    assert network.training
    assert network.encoder.stages[0].training
    assert not frozen.training


def test_backward_outside_autocast_is_close_to_float32(case: tuple[str, str]) -> None:
    network = build(case)
    expanded = ExpandedPass(network)
    expected = gradients(network, expanded(image(case)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = expanded(image(case))
    found = gradients(network, outputs)
    pairs = [(found[name].flatten(), g.flatten()) for name, g in expected.items() if g is not None]
    a, b = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.97


@pytest.mark.parametrize("kind", [pytest.param("host", marks=pytest.mark.slow), "reversible"])
def test_compiled_beside_a_compiled_network_has_the_same_gradients(kind: str) -> None:
    torch._dynamo.reset()
    case = ("3d", kind)
    network = build(case)
    expanded = ExpandedPass(network)
    expected = gradients(network, [expanded(image(case)), *network(image(case))])
    names = list(expanded.state_dict())
    compiled, counter = torch.compile(network, backend="aot_eager"), CompileCounterWithBackend("aot_eager")
    expanded.compile_levels(backend=counter)
    outputs = expanded(image(case))
    # Recomputing levels are left out, so that the second part of the reversible network has none.
    assert counter.frame_count >= {"host": 2, "reversible": 1}[kind]
    assert list(expanded.state_dict()) == names
    found = gradients(network, [outputs, *compiled(image(case))])
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("network_class", [InvertibleUNet, PartiallyInvertibleUNet])
def test_a_network_of_another_shape_is_refused_with_a_cure(network_class: type[nn.Module]) -> None:
    network = network_class(input_channels=1, num_classes=2, **arguments("3d"))
    with pytest.raises(ValueError, match=r"use nnU-Net's own networks or ReversibleUNet"):
        ExpandedPass(network)


def test_a_network_without_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="got Linear: use"):
        ExpandedPass(nn.Linear(1, 1))


def test_two_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 stages, got 2"):
        ExpandedPass(build(("3d", "host"), **sizes([4, 8])))


@pytest.mark.parametrize("strides", [(2, 2, 2), (1, 2, 2), (4, 8, 8), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int16])
def test_labels_are_downsampled_as_nnunet_does(strides: tuple[int, ...], dtype: torch.dtype) -> None:
    labels = torch.randint(0, 4, (2, 3, 8, 16, 24)).to(dtype)
    transform = DownsampleSegForDSTransform([[1 / stride for stride in strides]])
    expected = torch.stack([transform._apply_to_segmentation(sample)[0] for sample in labels])
    found = downsample_labels(labels, strides)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found.is_contiguous()


def test_the_crop_is_the_centre() -> None:
    x = torch.arange(12 * 10.0).view(1, 1, 12, 10)
    torch.testing.assert_close(centre_crop(x, (8, 10)), x[:, :, 2:10])
    torch.testing.assert_close(centre_crop(x, (4, 2)), x[:, :, 4:8, 4:6])
    assert centre_crop(x, (4, 2)).is_contiguous()


def default_network() -> nn.Module:
    """nnU-Net's own network for an isotropic 3D data set at 8 GB."""
    return PlainConvUNet(1, num_classes=3, **isotropic(DEFAULT, deep_supervision=True))


def two_passes() -> nn.Module:
    return TwoPasses(default_network(), lambda _: [128] * 3)


@pytest.mark.parametrize(
    ("size", "to_p", "to_kp"),
    [
        pytest.param(160, 1.05, 0.55, marks=pytest.mark.slow),
        (192, 1.05, 0.35),
        pytest.param(224, 1.40, 0.35, marks=pytest.mark.slow),
    ],
)
def test_peak_of_a_step_is_that_of_the_small_patch(size: int, to_p: float, to_kp: float) -> None:
    peak = measure_step(two_passes, 1, [size] * 3).peak
    assert peak <= to_p * measure_step(default_network, 1, [128] * 3).peak
    assert peak <= to_kp * measure_step(default_network, 1, [size] * 3).peak


def test_peak_is_the_larger_of_both_passes_and_not_their_sum() -> None:
    expanded = measure_step(lambda: ExpandedPass(default_network()), 1, [192] * 3)
    standard = measure_step(default_network, 1, [128] * 3)
    peak = measure_step(two_passes, 1, [192] * 3).peak
    assert peak <= max(expanded.peak, standard.peak) + 2 * standard.parameters


def test_finest_level_without_gradient_holds_two_feature_maps_at_a_time() -> None:
    with FakeTensorMode():
        network = PlainConvUNet(1, num_classes=3, **isotropic([32, 64, 128], deep_supervision=True))
        shallow = ExpandedPass(network).shallow
        with torch.no_grad(), StorageTracker() as tracker:
            shallow(torch.empty(1, 1, 64, 64, 64))
    assert tracker.peak <= 2.3 * 4 * 32 * 64**3
