"""Networks from plans of others."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_ext.architectures.reversible_unet import ReversibleUNet
from nnunet_ext.trainers.from_plans import build_from_plans, check_residual_norm
from nnunet_ext.trainers.nnUNetTrainerActivationCheckpointing import nnUNetTrainerActivationCheckpointing
from nnunet_ext.trainers.nnUNetTrainerHalfWidth import nnUNetTrainerHalfWidth
from nnunet_ext.trainers.nnUNetTrainerHalfWidthBN import nnUNetTrainerHalfWidthBN
from nnunet_ext.trainers.nnUNetTrainerImplicit import nnUNetTrainerImplicit
from nnunet_ext.trainers.nnUNetTrainerReversible import nnUNetTrainerReversible
from tests.settings import tiny


def configuration(network: type, **changes: Any) -> ConfigurationManager:
    """A 2D configuration as nnU-Net's planners write it."""
    planned = tiny((8, 8)).configuration_manager.configuration  # two stages
    architecture = planned["architecture"]
    architecture["network_class_name"] = f"{network.__module__}.{network.__name__}"
    del architecture["arch_kwargs"]["n_conv_per_stage"]
    architecture["arch_kwargs"].update(changes)
    return ConfigurationManager(planned)


@pytest.mark.parametrize(
    ("network", "depth"),
    [
        (PlainConvUNet, {"n_conv_per_stage": [2, 3]}),
        (ResidualEncoderUNet, {"n_blocks_per_stage": [2, 3]}),
        (ReversibleUNet, {"n_conv_per_stage": [9, 9], "blocks_per_stage": [2, 3]}),
    ],
)
def test_depth_and_options_come_from_the_plans(network: type, depth: dict[str, Any]) -> None:
    built = build_from_plans(ReversibleUNet, configuration(network, **depth), 1, 2, True)
    assert isinstance(built, ReversibleUNet)
    assert [len(stage.couplings) for stage in built.encoder.stages] == [2, 3]
    assert built.decoder.deep_supervision


def test_plans_of_another_kind_of_network_are_refused() -> None:
    plans = configuration(ReversibleUNet, n_conv_per_stage=[1, 1], embed_dim=96)
    with pytest.raises(ValueError, match=r"plans are for .*ReversibleUNet and hold embed_dim: use plans of nnU-Net"):
        build_from_plans(ReversibleUNet, plans, 1, 2, True)


@pytest.mark.parametrize(
    "path", ["torch.nn.NoSuch", "no.such.Module", "torch.nn", "torch.pi", "", 3, True, ["torch.nn.Conv2d"], {}]
)
@pytest.mark.parametrize("name", ["norm_op", "conv_op"])
def test_a_name_that_is_no_class_is_refused_and_not_taken_for_none(name: str, path: Any) -> None:
    plans = configuration(ReversibleUNet, n_conv_per_stage=[1, 1], **{name: path})
    with pytest.raises(ValueError, match=rf"{name} must be null or the dotted path of a class, got .*: correct"):
        build_from_plans(ReversibleUNet, plans, 1, 2, True)


def test_a_module_that_fails_to_import_is_no_class(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_layers.py").write_text("import no_such_package_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    plans = configuration(ReversibleUNet, n_conv_per_stage=[1, 1], norm_op="broken_layers.Norm")
    with pytest.raises(ValueError, match="norm_op must be null or the dotted path"):
        build_from_plans(ReversibleUNet, plans, 1, 2, True)


@pytest.mark.parametrize("imported", [["no_such"], ["n_stages"], ["conv_op", "conv_op", "no_such"]])
def test_what_is_to_be_imported_must_be_there_and_have_a_path(imported: list[str]) -> None:
    plans = configuration(ReversibleUNet, n_conv_per_stage=[1, 1])
    plans.configuration["architecture"]["_kw_requires_import"] = imported
    with pytest.raises(ValueError, match=r"(must name arguments of arch_kwargs|n_stages must be null or)"):
        build_from_plans(ReversibleUNet, plans, 1, 2, True)


def test_a_name_that_is_said_twice_is_imported_once() -> None:
    plans = configuration(ReversibleUNet, n_conv_per_stage=[1, 1])
    plans.configuration["architecture"]["_kw_requires_import"] *= 2
    assert isinstance(build_from_plans(ReversibleUNet, plans, 1, 2, True), ReversibleUNet)


@pytest.mark.parametrize("name", ["input_channels", "num_classes", "self"])
def test_what_nnunet_gives_itself_is_refused_in_plans(name: str) -> None:
    plans = configuration(ReversibleUNet, n_conv_per_stage=[1, 1], **{name: 3})
    with pytest.raises(ValueError, match=f"hold {name}: use plans of nnU-Net"):
        build_from_plans(ReversibleUNet, plans, 1, 2, True)


BUILDERS = [
    lambda plans, *channels: build_from_plans(ReversibleUNet, plans, *channels, True),
    *(
        lambda plans, *channels, trainer=trainer: trainer.build_network_architecture(None, plans, *channels, True)
        for trainer in (
            nnUNetTrainerActivationCheckpointing,
            nnUNetTrainerHalfWidthBN,
            nnUNetTrainerImplicit,
            nnUNetTrainerReversible,
        )
    ),
]


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("arch_kwargs", None, "names with values, got None"),
        ("arch_kwargs", [], r"names with values, got \[\]"),
        ("arch_kwargs", {1: 2, "n_stages": 2}, "names with values, got {1: 2"),
        ("_kw_requires_import", None, "a list of names, got None"),
        ("_kw_requires_import", "conv_op", "a list of names, got 'conv_op'"),
        ("_kw_requires_import", [None], r"a list of names, got \[None\]"),
        ("network_class_name", None, "a text, got None"),
    ],
)
@pytest.mark.parametrize("build", BUILDERS)
def test_a_network_that_is_not_as_nnunet_writes_it_is_refused(build: Any, name: str, value: Any, rule: str) -> None:
    plans = configuration(PlainConvUNet, n_conv_per_stage=[1, 1])
    plans.configuration["architecture"][name] = value
    with pytest.raises(ValueError, match=f"^{name} must be {rule}.*: correct the plans, or plan the data set again"):
        build(plans, 1, 2)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("number", [0, -1, 10**9, True, None])
def test_no_trainer_builds_for_a_number_that_counts_no_channels(build: Any, number: Any) -> None:
    plans = configuration(PlainConvUNet, n_conv_per_stage=[1, 1])
    for channels, name in (((number, 2), "input_channels"), ((1, number), "num_classes")):
        with pytest.raises(ValueError, match=f"^{name} must be a whole number of 1 to 65536, got {number}: correct"):
            build(plans, *channels)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("name", ["norm_op_kwargs", "dropout_op_kwargs", "nonlin_kwargs"])
def test_no_trainer_builds_with_a_layer_of_infinite_options(build: Any, name: str) -> None:
    plans = configuration(PlainConvUNet, n_conv_per_stage=[1, 1], **{name: {"eps": float("nan")}})
    with pytest.raises(ValueError, match=f"The numbers of {name} must be finite, got {{'eps': nan}}: use what"):
        build(plans, 1, 2)


@pytest.mark.parametrize(
    ("features", "rule"),
    [
        ([4, "8"], "must be a whole number .* or a list of numbers"),
        ([4, None], "must be a whole number .* or a list of numbers"),
        ("48", "must be a whole number .* or a list of numbers"),
        ([], "needs plans with features_per_stage of at least 2"),
        (1, "needs plans with features_per_stage of at least 2, got 1"),
    ],
)
def test_features_that_have_no_half_are_refused(features: Any, rule: str) -> None:
    plans = configuration(PlainConvUNet, n_conv_per_stage=[1, 1], features_per_stage=features)
    with pytest.raises(ValueError, match=rule):
        nnUNetTrainerHalfWidth.build_network_architecture(None, plans, 1, 2, True)


def test_one_number_of_features_is_halved_for_all_stages() -> None:
    plans = configuration(PlainConvUNet, n_conv_per_stage=[1, 1], features_per_stage=8)
    network = nnUNetTrainerHalfWidth.build_network_architecture(None, plans, 1, 2, True)
    assert network.encoder.output_channels == [4, 4]


@pytest.mark.parametrize("path", [None, "", "torch.nn.Linear", "torch.nn.Conv1d", "os.system", "no.such.Conv", 3])
def test_half_width_with_batch_norm_needs_a_convolution(path: Any) -> None:
    plans = configuration(PlainConvUNet, n_conv_per_stage=[1, 1], conv_op=path)
    with pytest.raises(ValueError, match=r"^conv_op must be .*, got .*:"):
        nnUNetTrainerHalfWidthBN.build_network_architecture(None, plans, 1, 2, True)


@pytest.mark.parametrize(
    ("norm", "options", "is_refused"),
    [
        (None, None, True),
        ("torch.nn.InstanceNorm3d", {"eps": 1e-5}, True),
        ("torch.nn.InstanceNorm3d", {"affine": True}, False),
        ("torch.nn.BatchNorm3d", {}, False),
        ("torch.nn.BatchNorm3d", {"affine": False}, True),
        ("collections.OrderedDict", None, False),  # of others: nnU-Net's to judge
    ],
)
def test_residual_blocks_need_a_norm_with_weights(norm: Any, options: Any, is_refused: bool) -> None:
    arguments = {"norm_op": norm, "norm_op_kwargs": options}
    check_residual_norm("a.b.PlainConvUNet", arguments)
    with pytest.raises(ValueError, match=r"needs a norm with weights, got .*: use") if is_refused else nullcontext():
        check_residual_norm("a.b.ResidualEncoderUNet", arguments)
