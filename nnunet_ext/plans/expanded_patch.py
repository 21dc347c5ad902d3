"""What the planners of meU-net share: a standard patch planned for the memory, then the expanded one around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from nnunet_ext.architectures.blocks.expanded_patch import MIN_STAGES, divisors, expanded_patch, factors

# nnU-Net's own estimate is no more accurate than this.
TOLERATED = 1.1


class ExpandedPatchMixin:
    """Plans P as the planner behind it does, then kP as the patch, and notes both; place it before a planner.

    The configuration's ``patch_size`` is kP. Its ``me_unet`` holds ``standard_patch_size`` (P) and ``k``, kP / P per
    axis: less than asked for where the image is smaller than k P, 1 where P covers it. A network of fewer than three
    stages is planned as before.

    Attributes:
        k: size of kP over that of P, one number for all axes.
        expanded_share: memory of the expanded pass over that of a whole pass of the same patch, in 2D and 3D, measured
            with mixed precision (docs/methods/me_unet.md). Where the expanded pass needs clearly more than the
            standard one, P shrinks.
    """

    k: float = 1.5
    expanded_share: Mapping[int, float]

    def static_estimate_VRAM_usage(self: Any, patch_size: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N802
        """Estimate the larger of both passes."""
        dim = len(patch_size)
        ratio = self.expanded_share[dim] * prod(factors(self.k, dim))
        estimate = super().static_estimate_VRAM_usage(patch_size, *args, **kwargs)  # type: ignore[misc]
        return estimate * ratio if ratio > TOLERATED else estimate

    def get_plans_for_configuration(
        self: Any,
        spacing: Any,
        median_shape: Sequence[float],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[str, Any],
    ) -> dict[str, Any]:
        """Plan P, then expand it."""
        plan: dict[str, Any] = super().get_plans_for_configuration(  # type: ignore[misc]
            spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
        )
        standard = [int(size) for size in plan["patch_size"]]
        strides = plan["architecture"]["arch_kwargs"]["strides"]
        if len(strides) < MIN_STAGES:
            return plan
        divisor = divisors(strides, len(standard))
        patch = expanded_patch(standard, self.k, divisor, list(median_shape)[: len(standard)])
        # nnU-Net's rule: a batch holds at most 5 % of the data set's voxels, now in larger patches.
        covered = round(approximate_n_voxels_dataset * self.max_dataset_covered / prod(patch))
        return {
            **plan,
            "patch_size": list(patch),
            "batch_size": max(min(plan["batch_size"], covered), self.UNet_min_batch_size),
            "me_unet": {
                "k": [large / small for large, small in zip(patch, standard, strict=True)],
                "standard_patch_size": standard,
            },
        }
