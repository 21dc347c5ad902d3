"""What the planners of meU-net share: a standard patch P is planned for the memory, with the expanded one around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from nnunet_ext.architectures.expanded.patch import MIN_STAGES, divisors, expanded_patch
from nnunet_ext.plans.memory_planner import MemoryPlanner
from nnunet_ext.plans.patch_shapes import image_size


class ExpandedPatchPlanner(MemoryPlanner):
    """Plans kP as the patch of the configuration for the largest P, and notes both; goes before a planner of a host.

    The configuration's ``patch_size`` is kP. Its ``me_unet`` holds ``standard_patch_size`` (P) and ``k``, kP / P per
    axis: less than asked for where the image is smaller than k P, 1 where P covers it. A network of fewer than three
    stages is planned as before. Memory is the larger of both passes, so a large k shrinks P.

    Attributes:
        k: Size of kP over that of P, one number for all axes.
        expanded_share: Memory of the expanded pass over that of a full pass of the same patch, in 2D and 3D, about
            (docs/methods/me_unet.md); it only steers the search.
    """

    k: float = 1.5
    expanded_share: Mapping[int, float] = {2: 0.47, 3: 0.24}

    def with_patch(self, plan: dict[str, Any], patch: Sequence[int]) -> dict[str, Any] | None:
        """Take the patch as P and expand it."""
        planned = super().with_patch(plan, patch)
        strides = planned["architecture"]["arch_kwargs"]["strides"] if planned else ()
        if planned is None or len(strides) < MIN_STAGES:
            return planned
        standard = planned["patch_size"]
        image = image_size(list(planned["median_image_size_in_voxels"])[: len(standard)])
        expanded = expanded_patch(standard, self.k, divisors(strides, len(standard)), image)
        k = [large / small for large, small in zip(expanded, standard, strict=True)]
        return {**planned, "patch_size": list(expanded), "me_unet": {"k": k, "standard_patch_size": standard}}

    def memory_voxels(self, plan: dict[str, Any]) -> float:
        """Of the pass that needs more."""
        patch = plan["patch_size"]
        return max(prod(self.decisive_patch(plan)), self.expanded_share[len(patch)] * prod(patch))

    def decisive_patch(self, plan: dict[str, Any]) -> Sequence[int]:
        """P, where there is one."""
        patch: Sequence[int] = plan["me_unet"]["standard_patch_size"] if "me_unet" in plan else plan["patch_size"]
        return patch
