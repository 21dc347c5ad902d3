"""What plans of a U-Net may hold; whatever else JSON can hold is refused by a sentence."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_ext.architectures.common.host_unet import host_unet
from nnunet_ext.architectures.common.plan_arguments import PlanArguments, parameters_of
from nnunet_ext.architectures.faster_fusion_unet import FasterFusionUNet
from nnunet_ext.architectures.implicit_unet import ImplicitUNet
from nnunet_ext.architectures.invertible_unet import InvertibleUNet
from nnunet_ext.architectures.partially_invertible_unet import PartiallyInvertibleUNet
from nnunet_ext.architectures.post_concat_unet import PostConcatUNet
from nnunet_ext.architectures.reversible_unet import ReversibleUNet
from tests.contract.plans import isotropic

PLAN = isotropic([4, 8], 2)


def checked(**changes: Any) -> None:
    PlanArguments.of(PLAN | changes).check("U-Net")


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("n_stages", "2", "a whole number"),
        ("n_stages", True, "a whole number"),
        ("n_stages", 2.0, "a whole number"),
        ("n_stages", None, "a whole number"),
        ("features_per_stage", None, "a whole number .* or a list of numbers"),
        ("features_per_stage", [4, "8"], "a list of numbers"),
        ("features_per_stage", [4, 10**30], "below 2\\^31"),
        ("kernel_sizes", [[3, 3], [3, None]], "lists of them"),
        ("strides", {"0": 1}, "lists of them"),
        ("n_conv_per_stage_decoder", 1.5, "a whole number"),
        ("conv_bias", "false", "true or false"),
        ("conv_bias", 1, "true or false"),
        ("conv_op", "torch.nn.Conv2d", "_kw_requires_import"),
        ("norm_op", nn.InstanceNorm2d(4), "_kw_requires_import"),
        ("norm_op_kwargs", [1], "names with values"),
        ("nonlin_kwargs", "inplace", "names with values"),
    ],
)
def test_a_value_of_another_type_is_refused_with_name_type_and_value(name: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*{rule}.*, got .*: correct the plans"):
        checked(**{name: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"n_stages": np.int64(2)},
        {"features_per_stage": np.array([4, 8])},
        {"features_per_stage": (4, 8), "kernel_sizes": 3, "strides": ((1, 1), (2, 2))},
        {"norm_op_kwargs": None, "nonlin_kwargs": None},
    ],
)
def test_numbers_of_numpy_tuples_and_null_are_taken_as_planners_give_them(changes: dict[str, Any]) -> None:
    checked(**changes)


def test_missing_and_unknown_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"missing: strides; unknown: window\): plan the data set again"):
        PlanArguments.of({name: PLAN[name] for name in PLAN if name != "strides"} | {"window": 7})


def test_what_nnunet_gives_itself_is_no_argument_of_plans() -> None:
    assert not {"self", "input_channels", "num_classes", "plan_arguments"} & parameters_of(ReversibleUNet)
    assert {"strides", "deep_supervision", "blocks_per_stage"} < parameters_of(ReversibleUNet)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), [0, float("nan")]])
@pytest.mark.parametrize("name", ["norm_op", "dropout_op", "nonlin"])
def test_options_of_layers_are_finite_also_where_there_is_no_layer(name: str, number: Any) -> None:
    with pytest.raises(ValueError, match=rf"numbers of {name}_kwargs must be finite, got .*(nan|inf).*: use what"):
        checked(**{name: None, f"{name}_kwargs": {"a": 1, "b": number}})


@pytest.mark.parametrize(
    ("features", "weights", "fits"), [([4, 8], 1, True), ([8, 8], 8, True), ([4, 8], 8, False), ([8, 8], 7, False)]
)
def test_a_weight_per_channel_needs_as_many_channels_everywhere(features: list[int], weights: int, fits: bool) -> None:
    changes = {"features_per_stage": features, "nonlin": nn.PReLU, "nonlin_kwargs": {"num_parameters": weights}}
    refused = pytest.raises(ValueError, match=f"got num_parameters {weights} for .* channels: use 1")
    with nullcontext() if fits else refused:
        network = host_unet(PlanArguments.of(PLAN | changes), 1, 2, False)
        assert network(torch.randn(2, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"conv_op": nn.Conv1d}, "conv_op must be .*Conv2d or Conv3d, got Conv1d"),
        ({"conv_op": nn.Linear}, "got Linear"),
        ({"norm_op": nn.InstanceNorm3d}, "a norm of 2 axes.*got InstanceNorm3d: use InstanceNorm2d"),
        ({"norm_op": nn.LayerNorm}, "norm_op must run on feature maps of 2 axes, got LayerNorm"),
        ({"norm_op_kwargs": {"no_such": 1}}, "norm_op must run .*no_such"),
        ({"norm_op_kwargs": {"momentum": "0.1"}}, "norm_op must run .*'0.1'"),
        ({"norm_op_kwargs": {"eps": 0}}, "eps of norm_op must be above 0, got 0"),
        ({"norm_op_kwargs": {"momentum": -1}}, "momentum of norm_op must lie in 0 to 1, got -1"),
        ({"nonlin": nn.GELU}, "nonlin must run .*inplace"),
        ({"nonlin": nn.GLU, "nonlin_kwargs": {"dim": 1}}, "nonlin must (run|keep)"),
        ({"nonlin": nn.AvgPool2d, "nonlin_kwargs": {"kernel_size": 2}}, "nonlin must keep the shape"),
        ({"nonlin_kwargs": {"negative_slope": 1e300}}, "nonlin must run .*overflow"),
        ({"nonlin": nn.ELU, "nonlin_kwargs": {"alpha": -1e39}}, "nonlin must (run|keep)"),
        ({"nonlin": nn.Softplus, "nonlin_kwargs": {"beta": 0}}, "nonlin must keep a feature map finite, got Softplus"),
        ({"dropout_op": nn.Dropout2d, "dropout_op_kwargs": {"p": "x"}}, "dropout_op must run"),
        ({"dropout_op": nn.Dropout2d, "dropout_op_kwargs": {"p": 1}}, "p of dropout_op .* below 1, got 1"),
    ],
)
def test_a_layer_that_cannot_run_between_the_convolutions_is_refused(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        checked(**changes)


@pytest.mark.parametrize("without_numbers", [FakeTensorMode(), torch.device("meta")])
def test_a_layer_is_tried_also_where_tensors_hold_no_numbers(without_numbers: Any) -> None:
    with without_numbers:
        checked()


def test_trying_a_layer_draws_no_random_number() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    checked(dropout_op=nn.Dropout2d, dropout_op_kwargs={"p": 0.5}, nonlin=nn.RReLU)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"n_stages": 10**7, "features_per_stage": 4, "kernel_sizes": 3, "strides": 1}, "at most 100 stages"),
        ({"n_conv_per_stage": 10**7}, "at most 1000 blocks"),
        ({"features_per_stage": [4, 10**7]}, r"at most 1e\+10 weights"),
        ({"strides": [[1, 1], [10**6, 10**6]]}, r"at most 1e\+10 weights"),
    ],
)
def test_a_network_that_no_machine_holds_is_refused_before_it_is_made(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        checked(**changes)


def test_numbers_for_lists_build_the_network_of_the_lists() -> None:
    numbers = PLAN | {"features_per_stage": 8, "kernel_sizes": 3, "strides": [1, 2], "n_conv_per_stage": 2}
    lists = PLAN | {"features_per_stage": [8, 8]}
    found, wanted = (host_unet(PlanArguments.of(plan), 1, 2, True) for plan in (numbers, lists))
    assert {k: v.shape for k, v in found.state_dict().items()} == {k: v.shape for k, v in wanted.state_dict().items()}


@pytest.mark.parametrize(
    ("network", "options", "rule"),
    [
        (FasterFusionUNet, {"batch_norm": "true"}, "batch_norm must be true or false, got 'true'"),
        (FasterFusionUNet, {"threshold": None}, "threshold must be a whole number"),
        (FasterFusionUNet, {"form": "other"}, '"hybrid" or "t" or "dense" or null'),
        (ImplicitUNet, {"dropout": "0.2"}, "dropout must be a number, got '0.2'"),
        (ImplicitUNet, {"mesh_spacing": [4, 4.5]}, "mesh_spacing must be"),
        (ImplicitUNet, {"mesh_spacing": []}, "mesh_spacing needs 2 numbers"),
        (ImplicitUNet, {"convs_per_stage": 0}, r"convs_per_stage must be at least 1, got \[0\]"),
        (ImplicitUNet, {"convs_per_stage": []}, r"convs_per_stage must be at least 1, got \[\]"),
        (ImplicitUNet, {"decoder_width": 10**6}, "decoder_width must be at most"),
        (ReversibleUNet, {"blocks_per_stage": [1, "2"]}, "blocks_per_stage must be"),
        (PostConcatUNet, {"prior_channels": 0.5}, "prior_channels must be"),
    ],
)
def test_an_option_of_another_type_or_range_is_refused(
    network: type[nn.Module], options: dict[str, Any], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        network(2, 2, **PLAN, **options)


@pytest.mark.parametrize("network", [InvertibleUNet, PartiallyInvertibleUNet, ReversibleUNet, ImplicitUNet])
def test_a_weight_for_each_of_seven_channels_fits_no_network_of_others(network: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"got num_parameters 7 for .* channels: use 1"):
        network(2, 2, **PLAN | {"nonlin": nn.PReLU, "nonlin_kwargs": {"num_parameters": 7}})


@pytest.mark.parametrize("network", [InvertibleUNet, PartiallyInvertibleUNet])
@pytest.mark.parametrize("asked", [0, -1, 3])
def test_no_more_channels_are_reconstructed_than_the_image_has(network: type[nn.Module], asked: int) -> None:
    with pytest.raises(ValueError, match=f"image_channels are the first of input_channels.*got {asked} of 2"):
        network(2, 2, **PLAN, vae=True, image_channels=asked)


@pytest.mark.parametrize(("frequencies", "size"), [(0, (8, 8)), (None, (1, 8))])
def test_the_implicit_network_needs_no_encoding_of_an_axis(frequencies: int | None, size: tuple[int, int]) -> None:
    plan = PLAN | {"strides": [[1, 1], [1, 2]]}
    network = ImplicitUNet(1, 2, **plan, frequencies=frequencies, decoder_width=8)
    network(torch.randn(2, 1, *size)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
