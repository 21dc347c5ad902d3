"""Dense logits from an implicit decoder that is asked at few voxels.

Naval Marimont and Tarroni 2022, https://arxiv.org/abs/2206.15217: (1) decode a coarse mesh, (2) fill each cell with the
logits of its point, (3) decode every voxel near the boundary. Different from the paper, so that what lies between mesh
points is found: cells that the mesh is unsure of are refined, cells get a second look where the finest features promise
another label, and refinement goes on until the labels at the rim of what was refined agree with the cells beyond. Then
every connected object that a decoded voxel touched is there as dense prediction has it.
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
_RIDGE = 1e-3  # of the mean variance of the finest features
_STRANGEST = 8  # one of so many second looks is at the strangest voxels
_MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """What is refined, and how.

    Args:
        margin: A cell whose most likely two classes are closer than this in probability is refined.
        threshold: So is one where a foreground class that did not win is more likely than this.
        second_look: Share of the cells (of those not refined yet) that get a second point: where another label is
            likeliest by the finest features; an eighth of them where these are strangest.
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
        wanted = self._with_second_look(wanted, coarse, labels, finest)
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

    def _with_second_look(self, wanted: Tensor, coarse: Tensor, labels: Tensor, finest: Tensor) -> Tensor:
        """Decode a second voxel of the most promising cells; want those where it has another label, or is unsure."""
        mesh = self._mesh
        count = int(self._refinement.second_look * prod(mesh.size))
        if count == 0 or tuple(finest.shape[1:]) != mesh.patch or prod(mesh.spacing) == 1:
            return wanted
        wanted, labels = wanted.flatten(), labels.flatten(1)
        settled = wanted.clone()
        with torch.autocast(finest.device.type, enabled=False):  # the regression is lost in half precision
            proposals = self._proposals(coarse, labels, finest)
        strangest = count // _STRANGEST
        for number, (scores, voxels) in zip((count - strangest, strangest), proposals, strict=True):
            cells = scores.masked_fill(settled, -torch.inf).topk(number).indices
            logits = decoded(self._decode, voxels[cells], self._refinement.chunk_on(finest.device))
            wanted[cells] |= (self._labels(logits) != labels[:, cells]).any(0) | self._unsure(logits)
            settled[cells] = True
        return wanted.view(mesh.size)

    def _proposals(self, coarse: Tensor, labels: Tensor, finest: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Propose two voxels of each cell by its finest features: the likeliest of another label, and the strangest.

        Likeliest: logits at p are about ``logits(m) + W (f(p) - f(m))``, where the slopes W are those of the linear
        regression over all mesh points m. Strangest: farthest from the mesh points' features (Mahalanobis distance),
        which is where the regression knows least.

        Shape: each (cells,) scores and (cells, dims) voxels.
        """
        mesh, flat = self._mesh, finest.detach().flatten(1)
        at_mesh = flat[:, flat_index(mesh.centres(flat.device), mesh.patch)].float().T  # (cells, C_0)
        logits = coarse.detach().flatten(1).float().T  # (cells, num_classes)
        mean = at_mesh.mean(0)
        precision, slopes = _regression(at_mesh - mean, logits - logits.mean(0))
        last = torch.tensor(mesh.patch, device=flat.device) - 1
        pieces: list[list[Tensor]] = [[], [], [], []]
        at_a_time = max(1, self._refinement.chunk_on(flat.device) // prod(mesh.spacing))
        for cells in torch.arange(len(at_mesh), device=flat.device).split(at_a_time):
            voxels = mesh.voxels_of_each(cells).minimum(last)
            features = flat[:, flat_index(voxels, mesh.patch)].float().permute(1, 2, 0)  # (n, voxels of a cell, C_0)
            predicted = logits[cells, None] + (features - at_mesh[cells, None]) @ slopes
            lead = self._lead(predicted, labels.T[cells, None])
            distance = (((features - mean) @ precision) * (features - mean)).sum(2)
            for i, scores in enumerate((lead, distance)):
                best = scores.max(1)
                chosen = best.indices[:, None, None].expand(-1, 1, voxels.shape[2])
                pieces[2 * i].append(best.values)
                pieces[2 * i + 1].append(voxels.gather(1, chosen)[:, 0])
        lead, likeliest, distance, strangest = (torch.cat(parts) for parts in pieces)
        return [(lead, likeliest), (distance, strangest)]

    def _lead(self, logits: Tensor, labels: Tensor) -> Tensor:
        """By how much another outcome is ahead of the labels. (..., num_classes), (..., 1 or num_classes) -> (...)."""
        if self._regions:
            return ((1 - 2 * labels) * logits).amax(-1)
        own = labels.long().expand(*logits.shape[:-1], 1)
        return logits.scatter(-1, own, -torch.inf).amax(-1) - logits.gather(-1, own)[..., 0]


def _regression(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse covariance of the features (n, C) and ridge regression of logits (n, K) on them, both centred.

    Shape: (C, C), (C, K).
    """
    covariance = features.T @ features / len(features)
    covariance += (_RIDGE * covariance.diagonal().mean() + 1e-7) * torch.eye(len(covariance), device=features.device)
    precision = torch.linalg.inv_ex(covariance).inverse
    return precision, precision @ (features.T @ logits / len(features))
