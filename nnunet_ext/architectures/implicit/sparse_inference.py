"""Dense logits from an implicit decoder that is asked at few voxels.

Naval Marimont and Tarroni 2022, https://arxiv.org/abs/2206.15217: (1) decode a coarse mesh, (2) fill each cell with the
logits of its point, (3) decode every voxel near the boundary. Different from the paper, so that what lies between mesh
points is found: cells that the mesh is unsure of are refined, cells whose finest features differ most from their mesh
point get a second look, and refinement goes on until the labels at the rim of what was refined agree with the cells
beyond. Then every connected object that a decoded voxel touched is there as dense prediction has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from nnunet_ext.architectures.implicit.decoder import flat_index, nearest

# Logits at voxels: (n, dims) -> (C, n).
Decode = Callable[[Tensor], Tensor]
_MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """What is refined, and how.

    Args:
        margin: A cell whose most likely two classes are closer than this in probability is refined.
        threshold: So is one where a foreground class that did not win is more likely than this.
        second_look: Share of the cells (those not refined yet, of most deviant features) that get a second point.
        dense_above: Share of cells above which everything is decoded.
        chunk_size: Voxels that are decoded at a time; at width 512 a voxel takes about 16 KiB in float32. None: 16384,
            on CUDA 65536, where small pieces leave the GPU idle.

    Raises:
        ValueError: a share outside 0 to 1, chunk_size below 1.
    """

    margin: float = 0.5
    threshold: float = 0.05
    second_look: float = 0.25
    dense_above: float = 0.5
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("margin", "threshold", "second_look", "dense_above"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in 0 to 1, got {value}.")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 voxel, got {self.chunk_size}.")

    def chunk_on(self, device: torch.device) -> int:
        """Voxels that are decoded at a time on this device."""
        return self.chunk_size or (65536 if device.type == "cuda" else 16384)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Cells of a patch; the last cell of an axis may be smaller.

    Args:
        patch: Voxels per axis.
        spacing: Voxels per cell and axis.
    """

    patch: tuple[int, ...]
    spacing: tuple[int, ...]

    @classmethod
    def fitting(cls, patch: Sequence[int], spacing: Sequence[int]) -> Mesh:
        """Take `spacing`, smaller where an axis would have fewer than eight cells."""
        fitted = tuple(min(s, max(1, n // 8)) for n, s in zip(patch, spacing, strict=True))
        return cls(patch=tuple(patch), spacing=fitted)

    @property
    def size(self) -> tuple[int, ...]:
        """Cells per axis."""
        return tuple(-(-n // s) for n, s in zip(self.patch, self.spacing, strict=True))

    def centres(self, device: torch.device) -> Tensor:
        """Voxel in the middle of each cell, row by row. Shape: (cells, dims)."""
        axes = [
            (torch.arange(n, device=device) * s + s // 2).clamp_max(voxels - 1)
            for n, s, voxels in zip(self.size, self.spacing, self.patch, strict=True)
        ]
        return torch.cartesian_prod(*axes).view(-1, len(axes))

    def voxels(self, cells: Tensor) -> Tensor:
        """Voxels of cells inside the patch. Shape: (n,) row-major indices -> (voxels, dims)."""
        voxels = self.voxels_of_each(cells).flatten(0, 1)
        if all(n % s == 0 for n, s in zip(self.patch, self.spacing, strict=True)):
            return voxels
        return voxels[(voxels < torch.tensor(self.patch, device=cells.device)).all(1)]

    def voxels_of_each(self, cells: Tensor) -> Tensor:
        """Voxels of each cell, also those beyond the patch. Shape: (n,) -> (n, voxels of a cell, dims)."""
        starts = unravel(cells, self.size) * torch.tensor(self.spacing, device=cells.device)
        axes = [torch.arange(s, device=cells.device) for s in self.spacing]
        return starts[:, None] + torch.cartesian_prod(*axes).view(-1, len(axes))

    def pooled(self, values: Tensor, margin: int = 0) -> Tensor:
        """Largest value of each cell, widened by `margin` voxels on each side. Shape: (C, *patch) -> (C, *cells)."""
        for axis, s in enumerate(self.spacing):
            if s > 1 or margin:
                values = _max_along(values, axis, s + 2 * margin, s, margin)
        return values

    def widened(self, values: Tensor) -> Tensor:
        """Largest value of each cell and its neighbours across faces, edges, corners. Shape: (C, *cells), same."""
        for axis in range(len(self.spacing)):
            values = _max_along(values, axis, 3, 1, 1)
        return values

    def filled(self, values: Tensor) -> Tensor:
        """Values of the cells at all their voxels. Shape: (C, *cells) -> (C, *patch), contiguous."""
        return nearest(values, self.patch, self.spacing, first_axis=1).contiguous()


def _max_along(values: Tensor, axis: int, kernel: int, stride: int, padding: int) -> Tensor:
    """Max pooling along one axis of (C, *size)."""
    dims = values.ndim - 1

    def only(n: int, other: int) -> list[int]:
        return [n if i == axis else other for i in range(dims)]

    pool = _MAX_POOL[dims]
    return pool(values[None], only(kernel, 1), only(stride, 1), only(padding, 0), ceil_mode=True)[0]


def unravel(index: Tensor, size: Sequence[int]) -> Tensor:
    """Row-major index to coordinates. Shape: (n,) -> (n, dims)."""
    axes = []
    for n in reversed(size):
        axes.append(index % n)
        index = index.div(n, rounding_mode="floor")
    return torch.stack(axes[::-1], -1)


def decoded(decode: Decode, voxels: Tensor, chunk_size: int) -> Tensor:
    """Decode voxels in chunks. Shape: (n, dims) -> (C, n)."""
    return torch.cat([decode(piece) for piece in voxels.split(chunk_size)], 1)


def dense_logits(decode: Decode, patch: Sequence[int], chunk_size: int, device: torch.device) -> Tensor:
    """Decode every voxel. Shape: (C, *patch)."""
    voxels = prod(patch)
    starts = range(0, voxels, chunk_size)
    pieces = (torch.arange(s, min(s + chunk_size, voxels), device=device) for s in starts)
    return torch.cat([decode(unravel(piece, patch)) for piece in pieces], 1).unflatten(1, tuple(patch))


class SparsePrediction:
    """Prediction of one patch.

    Args:
        decode: Logits at voxels.
        mesh: Cells of the patch.
        refinement: What is refined.
        regions: Whether each class has a sigmoid of its own, or all share a softmax.
        assumed_share: Refine this share of the cells, whichever they are, with the work of choosing them; for
            benchmarks and counting. None: refine what needs it.

    Attributes:
        refined: Cells that were refined.
    """

    def __init__(
        self, decode: Decode, mesh: Mesh, refinement: Refinement, regions: bool, assumed_share: float | None = None
    ) -> None:
        self._decode, self._mesh, self._refinement, self._regions = decode, mesh, refinement, regions
        self._assumed_share = assumed_share
        self.refined = 0

    def logits(self, finest: Tensor) -> Tensor:
        """Decode what is needed, fill the rest.

        Args:
            finest: Feature map (C, *size) of the finest encoder stage.

        Shape: (num_classes, *patch).
        """
        mesh, chunk = self._mesh, self._refinement.chunk_on(finest.device)
        centres = mesh.centres(finest.device)
        coarse = decoded(self._decode, centres, chunk).unflatten(1, mesh.size)
        labels = self._labels(coarse)
        wanted = (mesh.widened(labels) != -mesh.widened(-labels)).any(0) | self._unsure(coarse)
        wanted = self._with_second_look(wanted, labels, finest)
        logits = mesh.filled(coarse)
        if self._assumed_share is not None:
            self._refine_assumed(logits)
        else:
            self._refine(logits, mesh.filled(labels), wanted)
        return logits

    def _refine(self, logits: Tensor, labels: Tensor, wanted: Tensor) -> None:
        """Decode the wanted cells in place, then those at whose rim labels differ, until none is left."""
        done = torch.zeros_like(wanted)
        while bool(wanted.any()):
            if (done | wanted).float().mean() > self._refinement.dense_above:
                wanted = ~done
            self._decode_cells(wanted.flatten().nonzero()[:, 0], logits, labels)
            done |= wanted
            largest = self._mesh.pooled(torch.cat([labels, -labels]), margin=1)
            highest, lowest = largest.chunk(2)
            wanted = (highest != -lowest).any(0) & ~done
        self.refined = int(done.sum())

    def _refine_assumed(self, logits: Tensor) -> None:
        """Decode as many cells as assumed, evenly spread."""
        cells = prod(self._mesh.size)
        self.refined = ceil((self._assumed_share or 0) * cells)
        if self.refined:
            chosen = torch.linspace(0, cells - 1, self.refined, device=logits.device).long()
            self._decode_cells(chosen, logits, None)

    def _decode_cells(self, cells: Tensor, logits: Tensor, labels: Tensor | None) -> None:
        """Write logits, and labels where given, of all voxels of cells."""
        voxels = self._mesh.voxels(cells)
        for piece in voxels.split(self._refinement.chunk_on(logits.device)):
            values = self._decode(piece)
            index = flat_index(piece, self._mesh.patch)
            logits.view(len(logits), -1)[:, index] = values
            if labels is not None:
                labels.view(len(labels), -1)[:, index] = self._labels(values)

    def _labels(self, logits: Tensor) -> Tensor:
        """What is compared between voxels: the winning class, or for each region whether it is there.

        Shape: (num_classes, ...) -> (1 or num_classes, ...), float32.
        """
        found = logits.detach() > 0 if self._regions else logits.detach().argmax(0, keepdim=True)
        return found.float()

    def _unsure(self, logits: Tensor) -> Tensor:
        """Where another outcome is about as likely, or a foreground class is likely enough. (C, ...) -> (...)."""
        margin, threshold = self._refinement.margin, self._refinement.threshold
        logits = logits.detach().float()
        if self._regions:
            p = logits.sigmoid()
            return (((2 * p - 1).abs() < margin) | ((p < 0.5) & (p > threshold))).any(0)
        p = logits.softmax(0)
        best = p.topk(min(2, len(p)), 0).values
        runner_up = best[-1] if len(p) > 1 else torch.zeros_like(best[0])
        losers = (p > threshold) & (p < best[:1])
        return (best[0] - runner_up < margin) | losers[1:].any(0)

    def _with_second_look(self, wanted: Tensor, labels: Tensor, finest: Tensor) -> Tensor:
        """Decode the most deviant voxel of the most deviant cells; want cells that turn out mixed, and neighbours."""
        mesh = self._mesh
        count = int(self._refinement.second_look * prod(mesh.size))
        if count == 0 or tuple(finest.shape[1:]) != mesh.patch or prod(mesh.spacing) == 1:
            return wanted
        deviation = self._deviation(finest.detach())
        highest = mesh.pooled(deviation)[0]
        chosen = highest.masked_fill(wanted, -1).flatten().topk(count).indices
        voxels = self._most_deviant(deviation, chosen)
        logits = decoded(self._decode, voxels, self._refinement.chunk_on(finest.device))
        mixed = (self._labels(logits) != labels.flatten(1)[:, chosen]).any(0) | self._unsure(logits)
        found = torch.zeros(mesh.size, device=finest.device).flatten()
        found = found.scatter(0, chosen, mixed.float()).view(1, *mesh.size)
        return wanted | (mesh.widened(found)[0] > 0)

    def _deviation(self, finest: Tensor) -> Tensor:
        """Squared distance of the finest features to those of the cell's mesh point. (C, *patch) -> (1, *patch)."""
        mesh = self._mesh
        centres = flat_index(mesh.centres(finest.device), mesh.patch)
        deviation = torch.zeros(1, *mesh.patch, device=finest.device)
        for channel in finest:  # one by one: a map of all differences would be the largest tensor of prediction
            at_centres = channel.flatten()[centres].view(1, *mesh.size)
            deviation += (channel - mesh.filled(at_centres)).float().square()
        return deviation

    def _most_deviant(self, deviation: Tensor, cells: Tensor) -> Tensor:
        """Voxel of largest deviation of each cell. Shape: (1, *patch), (n,) -> (n, dims)."""
        mesh = self._mesh
        last = torch.tensor(mesh.patch, device=cells.device) - 1
        voxels = mesh.voxels_of_each(cells).minimum(last)
        values = deviation.flatten()[flat_index(voxels.flatten(0, 1), mesh.patch)].view(voxels.shape[:2])
        chosen = values.argmax(1)[:, None, None].expand(-1, 1, voxels.shape[2])
        return voxels.gather(1, chosen)[:, 0]
