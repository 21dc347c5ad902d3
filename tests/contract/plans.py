"""Network arguments as nnU-Net's planners write them, small enough for tests."""

from __future__ import annotations

from typing import Any

from torch import nn

PATCHES = {"2d": (32, 32), "3d": (16, 16, 16), "anisotropic": (8, 32, 32), "resenc": (16, 16, 16)}


def arguments(case: str) -> dict[str, Any]:
    """Keyword arguments of an architecture, for a key of `PATCHES`."""
    dim = len(PATCHES[case])
    kernels, strides = [[3] * dim] * 3, [[1] * dim, [2] * dim, [2] * dim]
    if case == "anisotropic":
        kernels, strides = [[1, 3, 3], [3, 3, 3], [3, 3, 3]], [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    depth = "n_blocks_per_stage" if case == "resenc" else "n_conv_per_stage"
    return {
        "n_stages": 3,
        "features_per_stage": [8, 16, 32],
        "conv_op": nn.Conv3d if dim == 3 else nn.Conv2d,
        "kernel_sizes": kernels,
        "strides": strides,
        depth: [1, 2, 2] if case == "resenc" else [2, 2, 2],
        "n_conv_per_stage_decoder": [1, 1] if case == "resenc" else [2, 2],
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d if dim == 3 else nn.InstanceNorm2d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }
