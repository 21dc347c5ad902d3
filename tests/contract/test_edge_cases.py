"""Plans at the edge of what nnU-Net's planners write: every architecture works, or refuses them by a sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnunet_ext import registry
from tests.contract.plans import arguments

Plan = dict[str, Any]
CLASSES = 2


def two_stages() -> Plan:
    """The plan that every case changes: 2D, two stages, few features."""
    plan = arguments("2d")
    sizes = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage")
    return plan | {name: plan[name][:2] for name in sizes} | {"n_stages": 2, "n_conv_per_stage_decoder": [1]}


def norm(operation: type[nn.Module] | None, kwargs: dict[str, Any] | None) -> Plan:
    return {"norm_op": operation, "norm_op_kwargs": kwargs}


class GroupNormOfChannels(nn.GroupNorm):
    """Two groups, built as nnU-Net builds a norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(2, channels)


ONE_STAGE: Plan = {
    "n_stages": 1,
    "features_per_stage": [8],
    "kernel_sizes": [[3, 3]],
    "strides": [[1, 1]],
    "n_conv_per_stage": [2],
    "n_conv_per_stage_decoder": [],
}
EDGES: dict[str, Plan] = {
    "as planned": {},
    "one stage": ONE_STAGE,
    "no stage": {name: 0 if name == "n_stages" else [] for name in ONE_STAGE},
    "kernels of 1": {"kernel_sizes": [[1, 1]] * 2},
    "kernels of 2": {"kernel_sizes": [[2, 2]] * 2},
    "kernels of 4": {"kernel_sizes": [[4, 4]] * 2},
    "an even kernel on one axis": {"kernel_sizes": [[3, 3], [3, 2]]},
    "kernels of another dimension": {"kernel_sizes": [[3, 3, 3]] * 2},
    "numbers for lists": {
        "features_per_stage": 8,
        "kernel_sizes": 3,
        "strides": [1, 2],
        "n_conv_per_stage": 1,
        "n_conv_per_stage_decoder": 1,
    },
    "short lists": {"features_per_stage": [8]},
    "no blocks": {"n_conv_per_stage": [0, 0]},
    "no blocks as a number": {"n_conv_per_stage": 0},
    "no blocks in the decoder": {"n_conv_per_stage_decoder": [0]},
    "no norm": norm(None, None),
    "norm without arguments": norm(nn.InstanceNorm2d, None),
    "norm without affine": norm(nn.InstanceNorm2d, {"eps": 1e-5, "affine": False}),
    "batch norm": norm(nn.BatchNorm2d, {}),
    "batch norm without affine": norm(nn.BatchNorm2d, {"affine": False}),
    "batch norm without statistics": norm(nn.BatchNorm2d, {"track_running_stats": False}),
    "no nonlinearity": {"nonlin": None, "nonlin_kwargs": None},
    "nonlinearity without arguments": {"nonlin_kwargs": None},
    "nonlinearity not in place": {"nonlin": nn.ReLU, "nonlin_kwargs": {"inplace": False}},
    "nonlinearity with weights": {"nonlin": nn.PReLU, "nonlin_kwargs": {}},
    "dropout": {"dropout_op": nn.Dropout2d, "dropout_op_kwargs": {"p": 0.5, "inplace": True}},
    "dropout without arguments": {"dropout_op": nn.Dropout2d, "dropout_op_kwargs": None},
    "group norm": norm(nn.GroupNorm, {"num_groups": 2}),
    "group norm of channels": norm(GroupNormOfChannels, {}),
    "no bias": {"conv_bias": False},
    "odd features": {"features_per_stage": [7, 13]},
    "no features": {"features_per_stage": [0, 16]},
    "fewer than no features": {"features_per_stage": [8, -16]},
    "broken features": {"features_per_stage": [8.0, 16.5]},
    "kernels below 1": {"kernel_sizes": [[3, 3], [-1, 3]]},
    "one feature": {"features_per_stage": [1, 2]},
    "strides of one axis": {"strides": [[1, 1], [1, 2]]},
    "strides of 4": {"strides": [[1, 1], [4, 4]]},
    "strides of 0": {"strides": [[1, 1], [0, 2]]},
    "strides at once": {"strides": [[2, 2], [1, 1]]},
    "no strides": {"strides": [[1, 1], [1, 1]]},
}

# What residual blocks treat in another way than plain ones.
RESIDUAL = {"norm_op", "nonlin", "dropout_op", "n_stages", "n_conv_per_stage"}


@pytest.fixture(params=registry.names("architectures"))
def network_class(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return registry.resolve("architectures", request.param)


def built(network_class: Callable[..., Any], plan: Plan) -> Any:
    """The network, or None where it refuses the plan; nothing but a ValueError or NotImplementedError may do so."""
    torch.manual_seed(0)
    try:
        network = network_class(input_channels=1, num_classes=CLASSES, deep_supervision=True, **plan)
    except (ValueError, NotImplementedError) as refused:
        text = str(refused)
        assert text.endswith(".")
        assert any(character.isdigit() for character in text), f"no value received: {text}"
        assert "\n" not in text
        return None
    return network.apply(network.initialize)


def tensors(outputs: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


@pytest.mark.parametrize(
    ("edge", "depth"),
    [
        *((edge, "n_conv_per_stage") for edge in EDGES),
        *((edge, "n_blocks_per_stage") for edge, changes in EDGES.items() if RESIDUAL & changes.keys()),
    ],
)
def test_trains_and_predicts_or_says_what_does_not_fit(
    network_class: Callable[..., Any], edge: str, depth: str
) -> None:
    plan = two_stages() | EDGES[edge]
    plan[depth] = plan.pop("n_conv_per_stage")
    network = built(network_class, plan)
    if network is None:
        assert edge not in ("as planned", "group norm of channels")
        return
    x = torch.randn(2, 1, 8, 8)
    outputs = tensors(network(x))
    assert outputs
    assert outputs[0].shape == (2, CLASSES, 8, 8)
    sum(output.square().mean() for output in outputs).backward()
    assert network.compute_conv_feature_map_size((8, 8)) > 0
    if hasattr(network, "decoder"):
        network.decoder.deep_supervision = False
    network.eval()
    with torch.inference_mode():
        logits = network(x)
    assert logits.shape == (2, CLASSES, 8, 8)
    assert logits.isfinite().all()


@pytest.mark.parametrize("size", [(8, 8), (7, 8), (8, 9), (1, 8), (8, 2), (1, 1)])
def test_a_patch_is_taken_or_the_sentence_names_its_divisors(
    network_class: Callable[..., Any], size: tuple[int, int]
) -> None:
    plan = two_stages() | {"strides": [[1, 1], [2, 2]]} | norm(nn.BatchNorm2d, {})
    network = built(network_class, plan).eval()
    x = torch.randn(1, 1, *size)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            if all(n % 2 == 0 for n in size) or takes(network, x):
                assert tensors(network(x))[0].shape == (1, CLASSES, *size)
            else:
                rule = rf"divisible by \[2, 2\].*got {re.escape(str(list(size)))}: use the patch of nnU-Net's plans"
                with pytest.raises(ValueError, match=rule):
                    network(x)


def takes(network: nn.Module, x: Tensor) -> bool:
    """Whether a network computes something of a patch that the strides do not divide."""
    try:
        network(x)
    except Exception:
        return False
    return True
