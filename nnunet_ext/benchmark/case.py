"""How many forward passes nnU-Net's sliding window needs for a case of median size."""

from __future__ import annotations

import math

from nnunet_ext.benchmark.setting import Setting

STEP = 0.5  # share of the patch between two tiles, nnU-Net's default


def tiles_per_case(setting: Setting) -> int | None:
    """Patches of one case of the configuration's median size; in 2D over all slices. None where it is not known."""
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

    patch = setting.patch_size
    median = setting.configuration_manager.configuration.get("median_image_size_in_voxels")
    shape = setting.plans.get("original_median_shape_after_transp")
    if not median or (len(patch) == 2 and not shape):
        return None
    # Smaller images are padded to the patch.
    image = [max(round(size), edge) for size, edge in zip(median[-len(patch) :], patch, strict=True)]
    slices = round(shape[0]) if len(patch) == 2 and shape else 1
    return slices * math.prod(map(len, compute_steps_for_sliding_window(tuple(image), patch, STEP)))


def passes_mirrored(setting: Setting) -> int:
    """Forward passes per patch with mirroring along all axes, as nnU-Net's trainers allow it by default."""
    return int(2 ** len(setting.patch_size))
