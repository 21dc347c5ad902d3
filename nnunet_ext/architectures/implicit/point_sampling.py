"""Points to train an implicit decoder on: near label boundaries, and anywhere.

Naval Marimont and Tarroni 2022, https://arxiv.org/abs/2206.15217: a share alpha of the points lies at label boundaries,
displaced by a normal distribution; the rest is uniform. Here points are voxels, because prediction is at voxel centres.
All shapes are static and all drawing is torch's, on the device of the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from nnunet_ext.architectures.implicit.decoder import flat_index


def points_per_patch(n_points: int, patch: Sequence[int]) -> int:
    """Points of a patch: `n_points`, at most a quarter of the voxels, at least one."""
    return max(1, min(n_points, prod(patch) // 4))


def at_points(values: Tensor, points: Tensor) -> Tensor:
    """Values of a map at voxels. Shape: (B, C, *patch), (B, K, dims) -> (B, C, K)."""
    index = flat_index(points, values.shape[2:])[:, None]
    return values.flatten(2).gather(2, index.expand(-1, values.shape[1], -1))


def valid_voxels(target: Tensor, ignore_label: int | None, regions: bool) -> Tensor:
    """Voxels that are not to be ignored. Shape: (B, C, *patch) -> (B, *patch).

    Args:
        target: Labels (B, 1, *patch), or regions (B, R, *patch), whose last channel is the voxels to be ignored where
            there is an ignore label: what nnU-Net's losses take.
        ignore_label: None where there is none.
        regions: Whether the target holds regions.
    """
    if ignore_label is None:
        return torch.ones_like(target[:, 0], dtype=torch.bool)
    return ~target[:, -1].bool() if regions else target[:, 0] != ignore_label


def boundary_voxels(target: Tensor, ignore_label: int | None = None, regions: bool = False) -> Tensor:
    """Voxels with a neighbour across a face that has another label, or is in another set of regions.

    A voxel to be ignored is no boundary and makes none. Arguments as of `valid_voxels`.

    Shape: (B, C, *patch) -> (B, *patch).
    """
    valid = valid_voxels(target, ignore_label, regions)
    labels = target[:, :-1] if regions and ignore_label is not None else target
    boundary = torch.zeros_like(valid)
    for axis in range(1, valid.ndim):
        n = valid.shape[axis] - 1
        here, there = labels.narrow(axis + 1, 0, n), labels.narrow(axis + 1, 1, n)
        differs = (here != there).any(1) & valid.narrow(axis, 0, n) & valid.narrow(axis, 1, n)
        boundary.narrow(axis, 0, n).logical_or_(differs)
        boundary.narrow(axis, 1, n).logical_or_(differs)
    return boundary


def reflect(position: Tensor, size: int) -> Tensor:
    """Mirror voxels beyond a border back at it, as often as needed: -1 -> 0, size -> size - 1."""
    folded = position.remainder(2 * size)
    return torch.where(folded < size, folded, 2 * size - 1 - folded)


@dataclass(frozen=True)
class PointSampler:
    """Draws the points of a training step.

    Args:
        n_points: Points per patch (k of the paper, 30,000); see `points_per_patch`.
        boundary_share: Share of them at label boundaries (alpha of the paper, 0.5).
        sigma: Standard deviation of their displacement per axis, in voxels (5 in the paper).
        class_balanced: Every label with a boundary gets the same number of points (not in the paper); for regions,
            every number of regions that a voxel lies in.

    Raises:
        ValueError: no point, a share outside 0 to 1, a negative sigma.
    """

    n_points: int
    boundary_share: float
    sigma: tuple[float, ...]
    class_balanced: bool = False

    def __post_init__(self) -> None:
        if self.n_points < 1:
            raise ValueError(f"n_points must be at least 1, got {self.n_points}.")
        if not 0 <= self.boundary_share <= 1:
            raise ValueError(f"boundary_share must lie in 0 to 1, got {self.boundary_share}.")
        if min(self.sigma) < 0:
            raise ValueError(f"sigma must not be negative, got {self.sigma}: 0 leaves points at the boundary.")

    @classmethod
    def for_spacing(
        cls, n_points: int, boundary_share: float, sigma: float, spacing: Sequence[float], class_balanced: bool = False
    ) -> PointSampler:
        """Make a sampler whose sigma, in voxels of the finest axis, is the same length (mm) along the other axes."""
        scaled = tuple(float(sigma * min(spacing) / s) for s in spacing)
        return cls(n_points, boundary_share, scaled, class_balanced)

    def __call__(
        self,
        target: Tensor,
        ignore_label: int | None = None,
        regions: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw points, those at boundaries first; uniform ones in their place where a patch has no boundary.

        Args:
            target, ignore_label, regions: Arguments of `valid_voxels`.
            generator: Generator on the device of the target; None: torch's own, which `torch.manual_seed` seeds.

        Shape: (B, C, *patch) -> (B, K, dims), int64.
        """
        patch = target.shape[2:]
        k = points_per_patch(self.n_points, patch)
        shape, device = (len(target), k), target.device
        uniform = torch.stack([torch.randint(n, shape, device=device, generator=generator) for n in patch], dim=-1)
        n_boundary = round(self.boundary_share * k)
        if n_boundary == 0:
            return uniform
        near = self._near_boundary(target, ignore_label, regions, n_boundary, uniform, generator)
        return torch.cat([near, uniform[:, n_boundary:]], 1)

    def _near_boundary(
        self,
        target: Tensor,
        ignore_label: int | None,
        regions: bool,
        n: int,
        uniform: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        weights = boundary_voxels(target, ignore_label, regions).flatten(1)
        weights = _balanced(weights, target, regions) if self.class_balanced else weights
        index, found = _draw(weights, n, generator)
        axes = []
        for axis, size in reversed(list(enumerate(target.shape[2:]))):
            shift = torch.randn(index.shape, device=index.device, generator=generator) * self.sigma[axis]
            axes.append(reflect(index % size + shift.round().long(), size))
            index = index.div(size, rounding_mode="floor")
        return torch.where(found[:, None, None], torch.stack(axes[::-1], -1), uniform[:, :n])


def _draw(weights: Tensor, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draw n indices of each row with replacement, and tell which rows hold any weight.

    Shape: (B, V) -> (B, n), (B,).
    """
    kind = torch.float32 if weights.device.type == "mps" else torch.float64  # sums of millions of voxels stay exact
    cumulated = weights.to(kind).cumsum(1)
    total = cumulated[:, -1:]
    drawn = torch.rand(len(weights), n, device=weights.device, dtype=kind, generator=generator) * total
    index = torch.searchsorted(cumulated, drawn, right=True)
    return index.clamp_max(weights.shape[1] - 1), total[:, 0] > 0


def _balanced(boundary: Tensor, target: Tensor, regions: bool) -> Tensor:
    """Weight each boundary voxel by one over the number of its label. Shape: (B, V) -> (B, V)."""
    labels = (target.bool().sum(1) if regions else target[:, 0]).flatten(1).long().clamp_min(0)
    counts = torch.zeros(len(labels), int(labels.max()) + 1, device=labels.device, dtype=torch.float64)
    counts.scatter_add_(1, labels, boundary.to(counts.dtype))
    return boundary / counts.gather(1, labels).clamp_min(1)
