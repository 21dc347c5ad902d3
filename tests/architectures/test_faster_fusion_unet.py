"""The FasterFusion U-Net: counted sizes, the fused form that runs by itself, and when it is made again."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from nnunet_ext.architectures import faster_fusion_unet
from nnunet_ext.architectures.faster_fusion_unet import FasterFusionUNet
from nnunet_ext.architectures.fusion import snapshot
from nnunet_ext.architectures.fusion.blocks import FasterFusionBlock
from nnunet_ext.architectures.fusion.folding import fold_batch_norms
from nnunet_ext.memory.network import deployed, measure_size, measure_step
from tests.contract.plans import DEFAULT, PATCHES, arguments, isotropic
from tests.contract.test_architectures import train_gradients

OPTIONS: dict[str, dict[str, Any]] = {
    "blocks": {"threshold": 8},
    "batch norm": {"threshold": 8, "batch_norm": True},
    "max pooling": {"threshold": 8, "downsample": "maxpool"},
    "both": {"threshold": 8, "decoder_split": "both", "divisor": [2, 4, 8]},
}
FULL = isotropic(DEFAULT)


def build(case: str = "3d", classes: int = 3, **options: Any) -> FasterFusionUNet:
    """A network in evaluation whose norms have seen something."""
    torch.manual_seed(0)
    network = FasterFusionUNet(2, classes, **arguments(case), **(options or OPTIONS["blocks"]))
    network.apply(network.initialize)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.3, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return network.eval()


def image(case: str = "3d", dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 2, *PATCHES[case], dtype=dtype)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the network logs from now on."""
    messages: list[str] = []
    faster_fusion_unet._log_form.cache_clear()
    monkeypatch.setattr(faster_fusion_unet._logger, "warning", lambda text, *values: messages.append(text % values))
    return messages


def blocks_of(network: nn.Module) -> list[FasterFusionBlock]:
    return [module for module in network.modules() if isinstance(module, FasterFusionBlock)]


def distance(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())


@pytest.mark.parametrize(
    ("options", "form", "parameters", "gmac"),
    [
        ({"downsample": "maxpool"}, "t", 11.86, 458),  # as published
        ({}, "hybrid", 8.95, 444),
        ({"threshold": 128, "batch_norm": True}, "hybrid", 7.30, 390),
        ({"threshold": 32, "batch_norm": True}, "hybrid", 6.79, 88),
        ({"threshold": 32, "batch_norm": True, "divisor": [4, 4, 8, 8, 8, 8]}, "hybrid", 4.00, 78),
    ],
)
def test_parameters_and_operations_are_those_of_the_table(
    options: dict[str, Any], form: Any, parameters: float, gmac: int
) -> None:
    def fused() -> nn.Module:
        return FasterFusionUNet(1, 3, **FULL, **options).fuse(form)

    size = measure_size(fused, 1, (128, 128, 128))
    assert round(size.parameters / 1e6, 2) == parameters
    assert round(size.macs / 1e9) == gmac


def test_default_and_trained_network_have_the_known_sizes() -> None:
    default = measure_size(lambda: PlainConvUNet(1, num_classes=3, **FULL), 1, (128, 128, 128))
    assert (round(default.parameters / 1e6, 2), round(default.macs / 1e9)) == (31.20, 477)
    network = FasterFusionUNet(1, 3, **FULL)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 10.66
    convs = [m for m in network.modules() if isinstance(m, (ConvDropoutNormReLU, FasterFusionBlock))]
    assert (len(blocks_of(network)), len(convs)) == (10, 22)


def test_residual_host_shrinks_as_counted() -> None:
    kwargs = {k: v for k, v in FULL.items() if k != "n_conv_per_stage"}
    kwargs |= {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6], "n_conv_per_stage_decoder": [1] * 5}

    def parameters(build: Any) -> float:
        return round(measure_size(build, 1, (64, 64, 64)).parameters / 1e6, 2)

    assert parameters(lambda: ResidualEncoderUNet(1, num_classes=3, **kwargs)) == 102.35
    assert parameters(deployed(lambda: FasterFusionUNet(1, 3, **kwargs))) == 23.36


@pytest.mark.parametrize("case", PATCHES)
def test_stem_pointwise_and_narrow_convolutions_stay(case: str) -> None:
    network = build(case, threshold=16)
    kept = [m for m in network.modules() if isinstance(m, ConvDropoutNormReLU)]
    assert all(m.output_channels < 16 or max(m.conv.kernel_size) == 1 for m in kept)
    assert all(b.geometry.output_channels >= 16 for b in blocks_of(network))
    everything = build(case, threshold=1, divisor=2)
    stem = next(m for m in everything.encoder.modules() if isinstance(m, ConvDropoutNormReLU))
    assert stem.input_channels == 2
    assert sum(isinstance(m, ConvDropoutNormReLU) and max(m.conv.kernel_size) > 1 for m in everything.modules()) == 1


@pytest.mark.parametrize("case", PATCHES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", ["hybrid", "t", "dense"])
def test_fused_network_equals_the_trained_one(case: str, options: str, form: Any) -> None:
    network = build(case, **OPTIONS[options])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        network.to(dtype)
        x = image(case, dtype)
        fused = network.fuse(form)
        assert distance(fused(x), network(x)) <= tolerance
        assert not blocks_of(fused)
    if OPTIONS[options].get("batch_norm"):
        assert not [m for m in fused.modules() if isinstance(m, _BatchNorm)]


@pytest.mark.parametrize("case", PATCHES)
@pytest.mark.parametrize("options", OPTIONS)
def test_evaluation_without_gradients_runs_the_fused_form_with_the_weights_of_training(
    case: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build(case, **OPTIONS[options])
    x, keys = image(case), list(network.state_dict())
    trained = network(x)
    calls = []
    monkeypatch.setattr(FasterFusionBlock, "forward", lambda self, x: calls.append(self))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert distance(network(x), trained) <= 1e-5
    assert not calls
    assert list(network.state_dict()) == keys


def load(network: FasterFusionUNet, other: FasterFusionUNet) -> None:
    network.load_state_dict(other.state_dict())


def assign(network: FasterFusionUNet, other: FasterFusionUNet) -> None:
    network.load_state_dict(other.state_dict(), assign=True)


def load_parts(network: FasterFusionUNet, other: FasterFusionUNet) -> None:
    network.encoder.load_state_dict(other.encoder.state_dict())
    network.decoder.load_state_dict(other.decoder.state_dict())


def copy_in_place(network: FasterFusionUNet, other: FasterFusionUNet) -> None:
    with torch.no_grad():
        for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)


def set_data(network: FasterFusionUNet, other: FasterFusionUNet) -> None:
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data.clone()


def moving_average(network: FasterFusionUNet, other: FasterFusionUNet) -> None:
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        mine.data.mul_(0.5).add_(theirs.data, alpha=0.5)


def running_statistics(network: FasterFusionUNet, other: FasterFusionUNet) -> None:
    for buffer in network.buffers():
        buffer.data.add_(1)


def write_to_the_memory(network: FasterFusionUNet, other: FasterFusionUNet) -> None:
    for mine in network.parameters():
        mine.detach().numpy()[:] += 0.1


def vector(network: FasterFusionUNet, other: FasterFusionUNet) -> None:
    vector_to_parameters(parameters_to_vector(other.parameters()).detach(), network.parameters())


def fused_optimizer(network: FasterFusionUNet, other: FasterFusionUNet) -> None:
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(network.parameters(), 0.05, fused=True).step()


def eps(network: FasterFusionUNet, other: FasterFusionUNet) -> None:
    for block in blocks_of(network):
        block.norm.eps = 1.0


def slope(network: FasterFusionUNet, other: FasterFusionUNet) -> None:
    for module in network.modules():
        if isinstance(module, nn.LeakyReLU):
            module.negative_slope = 0.5


def other_nonlinearity(network: FasterFusionUNet, other: FasterFusionUNet) -> None:
    for block in blocks_of(network):
        block.nonlin = nn.Tanh()


def other_part(network: FasterFusionUNet, other: FasterFusionUNet) -> None:
    network.decoder = other.decoder


CHANGES = [
    load,
    assign,
    load_parts,
    copy_in_place,
    set_data,
    moving_average,
    running_statistics,
    write_to_the_memory,
    vector,
    fused_optimizer,
    eps,
    slope,
    other_nonlinearity,
    other_part,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_fused_form_is_always_that_of_the_present_network(change: Any, mode: Any) -> None:
    network, other = build(), build()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    x = image()
    with mode():
        before = network(x)
    change(network, other)
    trained = network(x)  # with gradients
    assert distance(trained, before) > 1e-2
    with mode():
        assert distance(network(x), trained) <= 1e-5
    assert network._fused is not None


@pytest.mark.parametrize("change", [load, load_parts, copy_in_place, moving_average, eps])
def test_inference_tensors_are_fused_and_followed(change: Any) -> None:
    network, other = build(), build()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    with torch.inference_mode():
        network.double()
        assert all(p.is_inference() for p in network.parameters())
        network(image(dtype=torch.float64))
        change(network, other)
        found = network(image(dtype=torch.float64))
    assert network._fused is not None
    wanted = build()
    change(wanted, other)
    assert distance(found, wanted.double()(image(dtype=torch.float64))) <= 1e-5


def test_weights_of_two_kinds_are_compared_kind_by_kind() -> None:
    network = build().half()
    network.decoder.float()
    tensors = [*network.parameters(), *network.buffers()]
    kinds = {t.dtype for t in tensors}
    assert {joined.dtype for joined in snapshot._joined(tensors)} == kinds
    assert sum(len(joined) for joined in snapshot._joined(tensors)) == sum(t.numel() for t in tensors)


def test_parts_in_training_mode_hooks_and_parametrised_weights_are_not_fused(said: list[str]) -> None:
    def dropping(network: FasterFusionUNet) -> None:
        network.encoder.stages[1].train()

    def looking(network: FasterFusionUNet) -> None:
        blocks_of(network)[0].spatial.register_forward_hook(lambda *_: calls.append("hook"))

    def parametrised(network: FasterFusionUNet) -> None:
        nn.utils.parametrizations.weight_norm(blocks_of(network)[0].spatial)

    calls: list[str] = []
    for change, reason in (
        (dropping, "in training mode"),
        (looking, "hooks look into it"),
        (parametrised, "parametrised"),
    ):
        network = build()
        change(network)
        with torch.no_grad():
            network(image())
            network(image())
        assert network._fused is None
        assert [reason in message for message in said].count(True) == 1
    assert calls == ["hook"] * 2


class HalfConv(nn.Conv3d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


class HalfNorm(nn.BatchNorm3d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def dilated(block: FasterFusionBlock) -> None:
    block.spatial.dilation, block.spatial.padding = (2, 2, 2), (2, 2, 2)


def without_statistics(block: FasterFusionBlock) -> None:
    block.norm.running_mean = block.norm.running_var = None


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "spatial", nn.Sequential(block.spatial, nn.Tanh())),
        lambda block: setattr(block.spatial, "__class__", HalfConv),
        lambda block: setattr(block.projection, "padding_mode", "circular"),
        dilated,
        without_statistics,
        lambda block: setattr(block.norm, "__class__", HalfNorm),
        lambda block: setattr(block, "norm", nn.Identity()),
        lambda block: setattr(block, "norm", nn.InstanceNorm3d(block.norm.num_features, affine=True)),
        lambda block: setattr(block, "dropout", nn.Tanh()),
    ],
)
def test_blocks_with_other_parts_are_not_fused(change: Any, said: list[str]) -> None:
    network = build()
    change(blocks_of(network)[0])
    network.eval()
    trained = network(image())  # with gradients
    with torch.no_grad():
        assert distance(network(image()), trained) <= 1e-6
    assert any("parts of a block were replaced" in message for message in said)
    with pytest.raises(ValueError, match="can only be fused with plain convolutions"):
        network.fuse()


def test_batch_norms_behind_own_convolutions_and_own_batch_norms_are_not_folded() -> None:
    class Doubling(nn.Dropout3d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    plain, norm = nn.Conv3d(2, 2, 3), nn.BatchNorm3d(2)
    kept = [[HalfConv(2, 2, 3), norm], [plain, HalfNorm(2)], [plain, Doubling(), norm]]
    assert [fold_batch_norms(nn.Sequential(*layers)) for layers in kept] == [0, 0, 0]
    assert fold_batch_norms(nn.Sequential(plain, nn.Dropout3d(), norm)) == 1


def test_a_hook_of_the_whole_network_is_called_once() -> None:
    network, calls = build(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        network(image())
    assert network._fused is not None
    assert len(calls) == 1


def test_the_log_says_once_that_the_fused_form_runs(said: list[str]) -> None:
    network = build()
    with torch.inference_mode():
        for _ in range(3):
            network(image())
            network.load_state_dict(network.state_dict())
            network.eval()
    assert said == ["nnunet_ext: FasterFusionUNet predicts in its fused form."]


def test_compiled_prediction_says_once_that_it_is_not_fused_and_stays_one_graph(said: list[str]) -> None:
    torch._dynamo.reset()
    network = build()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.inference_mode():
        found = compiled(image())
        compiled(image())
    assert len(said) == 1
    assert "torch.compile is on" in said[0]
    assert network._fused is None
    assert distance(found, network(image())) <= 1e-5


def test_transformed_and_shape_only_weights_are_not_fused() -> None:
    networks, template, x = [build(), build()], build(), image()
    with torch.no_grad():
        blocks_of(networks[1])[0].spatial.weight.mul_(2)
        wanted = [network(x) for network in networks]

    def run(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(template, (parameters, buffers), (x,))

    with torch.no_grad():
        found = torch.func.vmap(run, randomness="error")(*torch.func.stack_module_state(networks))
        for mine, theirs in zip(found, wanted, strict=True):
            assert distance(mine, theirs) <= 1e-5
        assert build().to("meta")(image().to("meta")).shape == wanted[0].shape


@pytest.mark.parametrize(
    ("device", "dtype", "autocast", "batch_norm", "wanted"),
    [
        ("cuda", torch.float32, True, True, True),
        ("cuda", torch.float16, False, True, True),
        ("cuda", torch.float32, False, True, False),
        ("cuda", torch.float32, True, False, False),
        ("cpu", torch.float32, False, True, True),
        ("mps", torch.float16, False, True, False),
    ],
)
def test_layout_is_channels_last_without_norms_on_the_cpu_and_in_half_precision_on_cuda(
    device: str, dtype: torch.dtype, autocast: bool, batch_norm: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked without a CUDA device, on which autocast can't be entered."""
    network = build(threshold=8, batch_norm=batch_norm).fuse()
    x: Any = SimpleNamespace(device=torch.device(device), dtype=dtype, dim=lambda: 5)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: autocast)
    assert network._in_channels_last(x) == wanted


@pytest.mark.parametrize("options", OPTIONS)
def test_a_fused_network_moved_within_inference_mode_predicts_the_same(options: str) -> None:
    network = build(**OPTIONS[options])
    wanted = network.double()(image(dtype=torch.float64))
    fused = network.float().fuse()
    with torch.inference_mode():
        assert distance(fused.double()(image(dtype=torch.float64)), wanted) <= 1e-5
        fused.load_state_dict(network.fuse().state_dict())  # nnU-Net does so for each fold
        assert distance(fused(image(dtype=torch.float64)), wanted) <= 1e-5


@pytest.mark.parametrize("moved", [False, True])
def test_the_fused_form_is_made_once_while_nothing_changes(moved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network, made, fuse = build(), [], FasterFusionUNet.fuse
    monkeypatch.setattr(FasterFusionUNet, "fuse", lambda self: made.append(self) or fuse(self))
    with torch.inference_mode():
        if moved:
            network.double().float()
        for _ in range(3):
            network(image())
    assert len(made) == 1


def test_casting_and_copying_leave_no_old_form() -> None:
    network, x = build(), image()
    with torch.inference_mode():
        network(x)
        twin = copy.deepcopy(network)
        assert twin._fused is None
        network.double()
        assert network(x.double()).dtype == torch.float64


def test_deep_supervision_switches_the_fused_form_too() -> None:
    network, x = build(), image()
    with torch.inference_mode():
        assert isinstance(network(x), Tensor)
        network.decoder.deep_supervision = True
        assert len(network(x)) == 2


@pytest.mark.parametrize("options", OPTIONS)
def test_every_weight_of_blocks_gets_a_finite_gradient(options: str) -> None:
    network = build(**OPTIONS[options])
    network.decoder.deep_supervision = True
    train_gradients(network, image())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_blocks_have_the_same_gradients_and_predictions(options: str) -> None:
    torch._dynamo.reset()
    network = build(**OPTIONS[options])
    compiled = torch.compile(copy.deepcopy(network), backend="aot_eager")
    for found, wanted in zip(train_gradients(compiled, image()), train_gradients(network, image()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    network.eval()
    compiled.eval()
    with torch.inference_mode():
        torch.testing.assert_close(compiled(image()), network(image()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_channels_last_and_autocast_predict_the_same(options: str) -> None:
    network = build(**OPTIONS[options])
    x = image()
    with torch.inference_mode():
        wanted = network(x)
        found = copy.deepcopy(network).to(memory_format=torch.channels_last_3d)(
            x.to(memory_format=torch.channels_last_3d)
        )
        assert distance(found, wanted) <= 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert distance(network(x).float(), wanted) <= 0.1


def test_norms_that_were_synchronised_between_gpus_are_fused() -> None:
    network = build(threshold=8, batch_norm=True)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synchronised.modules())
    fused, x = synchronised.fuse(), image()
    assert not [m for m in fused.modules() if isinstance(m, _BatchNorm)]
    assert distance(fused(x), network(x)) <= 1e-5
    network.load_state_dict(synchronised.state_dict(), strict=True)


@pytest.mark.parametrize("case", PATCHES)
@pytest.mark.parametrize("form", ["hybrid", "t", "dense"])
def test_the_network_built_in_a_form_takes_its_weights(case: str, form: Any) -> None:
    fused = build(case, **OPTIONS["batch norm"]).fuse(form)
    torch.manual_seed(0)
    empty = FasterFusionUNet(2, 3, **arguments(case), **OPTIONS["batch norm"], form=form)
    empty.apply(empty.initialize)
    empty.eval().load_state_dict(fused.state_dict(), strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(empty(image(case)), fused(image(case)), rtol=0, atol=0)


def test_residual_blocks_start_as_identity() -> None:
    network = FasterFusionUNet(2, 3, **arguments("resenc"), threshold=8)
    network.apply(network.initialize)
    last = [m.conv2 for m in network.encoder.modules() if isinstance(m, BasicBlockD)]
    assert any(isinstance(block, FasterFusionBlock) for block in last)
    for block in last:
        x = torch.randn(2, block.geometry.input_channels, 4, 4, 4)
        assert block.train()(x).abs().max() == 0


def test_dropout_and_missing_nonlinearity_of_the_plans_are_kept() -> None:
    kwargs = arguments("3d") | {"dropout_op": nn.Dropout3d, "dropout_op_kwargs": {"p": 0.5}, "nonlin": None}
    network = FasterFusionUNet(2, 3, **kwargs, threshold=8)
    assert all(block.dropout.p == 0.5 and block.nonlin is None for block in blocks_of(network))
    network.eval()
    assert distance(network.fuse()(image()), network(image())) <= 1e-5


@pytest.mark.parametrize("host", ["plain", pytest.param("resenc", marks=pytest.mark.slow)])
def test_planned_memory_follows_what_training_keeps(host: str) -> None:
    kwargs = FULL | {"deep_supervision": True}
    if host == "resenc":
        kwargs = {k: v for k, v in kwargs.items() if k != "n_conv_per_stage"}
        kwargs |= {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6], "n_conv_per_stage_decoder": [1] * 5}
    patch = (64, 64, 64)

    def ratio(options: dict[str, Any]) -> tuple[float, float]:
        network = FasterFusionUNet(1, 3, **kwargs, **options)
        held = measure_step(lambda: FasterFusionUNet(1, 3, **kwargs, **options), 1, patch).held
        return network.compute_conv_feature_map_size(patch), held

    plain, blocks = ratio({"threshold": 1000}), ratio({"threshold": 32})
    assert blocks[0] / plain[0] == pytest.approx(blocks[1] / plain[1], rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divisor": [4, 4]}, r"divisor needs one number or 3 of them \(n_stages\), got \[4, 4\]"),
        ({"decoder_split": "down"}, "decoder_split must be .*got 'down'"),
        ({"n_blocks_per_stage": [1, 1, 1]}, "either n_conv_per_stage"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FasterFusionUNet(1, 3, **arguments("3d"), **options)


def test_a_fused_network_can_not_be_fused_again() -> None:
    with pytest.raises(ValueError, match="fused already"):
        build().fuse().fuse()
