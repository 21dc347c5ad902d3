"""Plans of tiny networks: large enough for every kind of step, small enough to train in milliseconds on a CPU."""

from __future__ import annotations

from typing import Any

from nnunet_ext.nnunet.setting import Setting

VOLUME, PLANE, RESIDUAL, CASCADE = "3d_fullres", "2d", "3d_resenc", "3d_cascade_fullres"
_PREVIOUS = "3d_lowres"
# Three stages, so that meU-net's second level has a head; patches whose smaller ones still have several voxels there.
_PATCHES = {3: [8, 12, 16], 2: [16, 24]}
_STRIDES = {3: [[1, 1, 1], [1, 2, 2], [2, 2, 2]], 2: [[1, 1], [2, 2], [2, 2]]}
_FEATURES = [4, 8, 8]


def settings() -> list[Setting]:
    """3D, 2D, residual encoder, and the second stage of a cascade."""
    volume = _configuration(3)
    configurations = {
        VOLUME: volume,
        PLANE: _configuration(2),
        RESIDUAL: _residual(volume),
        _PREVIOUS: {**volume, "next_stage": CASCADE},
        CASCADE: {**volume, "previous_stage": _PREVIOUS},
    }
    plans = {
        "dataset_name": "Dataset999_Gradients",
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "configurations": configurations,
    }
    dataset = {
        "channel_names": {"0": "noNorm"},
        "labels": {"background": 0, "one": 1, "two": 2},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    return [Setting(plans=plans, dataset=dataset, configuration=name) for name in (VOLUME, PLANE, RESIDUAL, CASCADE)]


def _configuration(dim: int) -> dict[str, Any]:
    """One configuration as nnU-Net's default planner writes it."""
    n_stages = len(_FEATURES)
    return {
        "data_identifier": "gradients",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": _PATCHES[dim],
        "spacing": [1.0] * dim,
        "normalization_schemes": ["NoNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": n_stages,
                "features_per_stage": _FEATURES,
                "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
                "kernel_sizes": [[3] * dim] * n_stages,
                "strides": _STRIDES[dim],
                "n_conv_per_stage": [1, 2, 1],  # and two of the decoder: alike, so that one can stand in both places
                "n_conv_per_stage_decoder": [2, 1],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


def _residual(volume: dict[str, Any]) -> dict[str, Any]:
    """The same as nnU-Net's planner of residual encoders writes it."""
    architecture = volume["architecture"]
    arguments = dict(architecture["arch_kwargs"])
    arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")
    name = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    return {**volume, "architecture": {**architecture, "network_class_name": name, "arch_kwargs": arguments}}
