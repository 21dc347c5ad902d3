"""Memory at the peak of a mixed-precision training step, in the unit that nnU-Net's planner counts in.

The planner compares `compute_conv_feature_map_size` with a reference count for a GPU memory target. What the reversible
networks need at their peak is divided by what nnU-Net's own network needs for each element that it counts; tests hold
the result near the measured peak (tests/architectures/).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from nnunet_ext.architectures.blocks.stages import GROUP_ELEMENTS, StageSpec

# Bytes at the peak of a mixed-precision training step of PlainConvUNet, in 2D and 3D, for each element that its
# compute_conv_feature_map_size counts.
BYTES_PER_COUNTED_ELEMENT = {2: 4.87, 3: 5.21}


def voxels_per_stage(stages: Sequence[StageSpec], input_size: Sequence[int]) -> list[int]:
    """Voxels of a feature map of each stage, finest first."""
    voxels, size = [], list(input_size)
    for stage in stages:
        size = [n // stride for n, stride in zip(size, stage.stride, strict=True)]
        voxels.append(prod(size))
    return voxels


def loss_bytes(num_classes: int, voxels: Sequence[int], deep_supervision: bool) -> int:
    """Logits, their normalisation and their gradient, of every stage that has a head in use."""
    return 10 * num_classes * sum(voxels[:-1] if deep_supervision else voxels[:1])


def walk_back_bytes(finest: int, dim: int, grouped: bool, working: float) -> float:
    """Bytes per sample that the backward pass of the finest stage needs beside what is kept.

    Args:
        finest: elements of its feature map.
        dim: number of spatial axes.
        grouped: whether samples are recomputed in groups.
        working: bytes per element that the group in work needs: streams, their gradients, the inside of f or g.
    """
    # Share of the batch that is recomputed at a time, for the batch sizes that nnU-Net plans for.
    batch_size = 2 if dim == 3 else 12
    share = min(1.0, max(1, GROUP_ELEMENTS // finest) / batch_size) if grouped else 1.0
    # Gradients of the stage's output and, where its samples go in groups, of its input (of the groups done, or
    # with many groups all of it).
    gradients = 4.0 if share == 1.0 else 4.0 * (2.0 - share) if share > 0.3 else 8.0
    return (gradients + working * share) * finest


def counted_elements(peak: float, dim: int) -> int:
    """Turn bytes per sample into nnU-Net's unit."""
    return int(peak / BYTES_PER_COUNTED_ELEMENT[dim])
