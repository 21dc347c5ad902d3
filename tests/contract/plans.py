"""Network arguments as nnU-Net's planners write them, small enough for tests."""

from __future__ import annotations

from typing import Any

from torch import nn

PATCHES = {"2d": (32, 32), "3d": (16, 16, 16), "anisotropic": (8, 32, 32), "resenc": (16, 16, 16)}


# Features of nnU-Net's plans for an isotropic 3D data set at 8 GB.
DEFAULT = [32, 64, 128, 256, 320, 320]


def sizes(features: list[int], dim: int = 3, convs: int = 2) -> dict[str, Any]:
    """What plans say of the sizes of isotropic stages with these features."""
    n = len(features)
    return {
        "n_stages": n,
        "features_per_stage": features,
        "kernel_sizes": [[3] * dim] * n,
        "strides": [[1] * dim] + [[2] * dim] * (n - 1),
        "n_conv_per_stage": [convs] * n,
        "n_conv_per_stage_decoder": [convs] * (n - 1),
    }


def isotropic(features: list[int], dim: int = 3, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of an architecture with these features."""
    return {
        **sizes(features, dim),
        "conv_op": nn.Conv3d if dim == 3 else nn.Conv2d,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d if dim == 3 else nn.InstanceNorm2d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        **changes,
    }


def arguments(case: str) -> dict[str, Any]:
    """Keyword arguments of an architecture, for a key of `PATCHES`."""
    found = isotropic([8, 16, 32], len(PATCHES[case]))
    if case == "anisotropic":
        found |= {"kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}
    if case == "resenc":
        del found["n_conv_per_stage"]
        found |= {"n_blocks_per_stage": [1, 2, 2], "n_conv_per_stage_decoder": [1, 1]}
    return found
