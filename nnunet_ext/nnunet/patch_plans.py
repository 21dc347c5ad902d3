"""Plans for a patch, with the network that nnU-Net's default planner gives it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.setting import Setting

FEATURES, MAX_FEATURES = 32, {2: 512, 3: 320}
BATCH_SIZE = {2: 12, 3: 2}  # nnU-Net's reference for a GPU of 8 GB
_SMALLEST_EDGE = 4  # of the coarsest feature map


def setting_of_patch(patch_size: Sequence[int], dataset: dict[str, Any], spacing: Sequence[float] = ()) -> Setting:
    """Plan for a patch; sizes that the strides don't fit are rounded up, as nnU-Net does.

    The plans hold no median image size, because there is no image.

    Args:
        patch_size: Two or three numbers of voxels.
        dataset: Content of dataset.json.
        spacing: Millimetres per axis; the same along all where none are given.

    Raises:
        UsageError: not two or three numbers, or too small for two stages.
    """
    dim = len(patch_size)
    shown = " ".join(map(str, patch_size))
    if dim not in MAX_FEATURES:
        raise UsageError(f"--patch needs two or three numbers, got {shown}: use for example 128 128 128.")
    if min(patch_size) < 2 * _SMALLEST_EDGE:
        raise UsageError(f"--patch needs at least {2 * _SMALLEST_EDGE} voxels per axis, got {shown}: enlarge it.")
    configuration = "2d" if dim == 2 else "3d_fullres"
    plans = {
        "dataset_name": "none",
        "plans_name": "planned for the patch",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "foreground_intensity_properties_per_channel": {},
        "configurations": {
            configuration: _configuration(patch_size, spacing or [1.0] * dim, len(dataset["channel_names"]))
        },
    }
    return Setting(plans=plans, dataset=dataset, configuration=configuration)


def narrow(setting: Setting, features: Sequence[int]) -> Setting:
    """The same setting with these features per stage, as many as it has stages."""
    plans = deepcopy(dict(setting.plans))
    arguments = plans["configurations"][setting.configuration]["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = list(features[: arguments["n_stages"]])
    return replace(setting, plans=plans)


def _configuration(patch_size: Sequence[int], spacing: Sequence[float], channels: int) -> dict[str, Any]:
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    dim = len(patch_size)
    _, strides, kernels, padded, _ = get_pool_and_conv_props(spacing, patch_size, _SMALLEST_EDGE, 999999)
    return {
        "batch_size": BATCH_SIZE[dim],
        "patch_size": [int(n) for n in padded],
        "spacing": list(spacing),
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": _arguments(dim, strides, kernels),
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


def _arguments(dim: int, strides: Any, kernels: Any) -> dict[str, Any]:
    n_stages = len(strides)
    return {
        "n_stages": n_stages,
        "features_per_stage": [min(FEATURES * 2**i, MAX_FEATURES[dim]) for i in range(n_stages)],
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": [list(kernel) for kernel in kernels],
        "strides": [list(stride) for stride in strides],
        "n_conv_per_stage": [2] * n_stages,
        "n_conv_per_stage_decoder": [2] * (n_stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
