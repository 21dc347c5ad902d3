"""Point decoder of the Implicit U-Net: a multilayer perceptron on feature maps looked up at points.

Naval Marimont and Tarroni 2022, "Implicit U-Net for Volumetric Medical Image Segmentation" (MIUA),
https://arxiv.org/abs/2206.15217. Decoder: DeepSDF (Park et al. 2019); positional encoding: NeRF (Mildenhall et al.
2020). Different from the paper: the first product is split over the feature maps (`PointDecoder`), and ReLU and
dropout keep one tensor (`ReLUDropout`). The layer that sees the input again grows by it; DeepSDF shrinks the layer
before instead, which is impossible here, because the input is wider than the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log2, pi, prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.dropout import _DropoutNd

from nnunet_ext.architectures.common.kept import is_everything_kept
from nnunet_ext.architectures.common.onednn import is_transformed

MAX_FREQUENCIES = 10  # octaves of the paper
# A product of weights and a whole map is computed for all its voxels only up to this many elements (float32: 256 MB).
_LARGEST_PRODUCT = 2**26
_LEVELS = 2**16  # of a random number of 16 bits


class _ReLUDropout(torch.autograd.Function):
    """``y = m max(x, 0) / (1 - p)`` with a random mask m; ``dx = dy (y > 0) / (1 - p)`` needs only y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        """Draw the mask from torch's generator; keep the output."""
        y = x.clamp_min(0)
        if p > 0:
            # Four values from each random number of 64 bits: nine times faster on a CPU than `bernoulli_`.
            bits = torch.empty(-(-y.numel() // 4), dtype=torch.int64, device=y.device).random_(-(2**63), None)
            dropped = min(round(p * _LEVELS), _LEVELS - 1)
            kept = bits.view(torch.int16)[: y.numel()].view(y.shape) >= dropped - _LEVELS // 2
            y.mul_(kept).mul_(1 / (1 - p))
        ctx.save_for_backward(y)
        ctx.scale = 1 / (1 - p)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Where y is zero, the value was negative or dropped: no gradient either way."""
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, y, 0).mul_(ctx.scale), None


class ReLUDropout(_DropoutNd):
    """ReLU, then dropout in training, keeping only the output for backward, which the next layer keeps anyway.

    Args:
        p: Probability of a value to be dropped, below 1; drawn with 16 bits.

    Shape: any, of the same shape.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        if is_transformed():
            return F.dropout(x.relu(), self.p, self.training)
        p = self.p if self.training else 0.0
        if is_everything_kept():  # the same random numbers, the gradient by autograd
            with torch.no_grad():
                passed = _ReLUDropout.apply(x, p) > 0
            return torch.where(passed, x, 0) / (1 - p)
        y: Tensor = _ReLUDropout.apply(x, p)
        return y


class WeightNormLinear(nn.Module):
    """Linear layer with weight norm: ``W = scale direction / |direction|``, a norm for each output.

    Args:
        in_features, out_features: Widths.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.randn(out_features, in_features) * sqrt(2 / in_features))
        self.scale = nn.Parameter(self.direction.detach().norm(dim=1, keepdim=True))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def weight(self) -> Tensor:
        """Effective weight (out, in)."""
        return self.direction * (self.scale / self.direction.norm(dim=1, keepdim=True))


class SegmentationHeads(nn.Linear):
    """Last layer, which also remembers in the checkpoint how its logits are meant: softmax or, for regions, sigmoid.

    Attributes:
        regions: Whether the heads are regions, each with a sigmoid of its own. The trainer sets it.
    """

    regions = False

    def get_extra_state(self) -> Tensor:
        """Make `regions` part of the state dict."""
        return torch.tensor(self.regions)

    def set_extra_state(self, state: Tensor) -> None:
        """Take `regions` from a state dict."""
        self.regions = bool(state)


def flat_index(points: Tensor, size: Sequence[int], stride: Sequence[int] | None = None) -> Tensor:
    """Row-major index of the voxel of a map that holds each point.

    Shape: points (..., dims) of the patch, map of `size` = patch / stride -> (...).
    """
    index = torch.zeros_like(points[..., 0])
    for axis, n in enumerate(size):
        along = points[..., axis]
        index = index * n + (along if stride is None else along.div(stride[axis], rounding_mode="floor"))
    return index


def octaves(size: int, frequencies: int | None) -> int:
    """Octaves of the positional encoding on an axis of `size` voxels.

    None: min(10, floor(log2 size)). On voxel centres a higher octave is constant where the size is a power of two and a
    combination of the others for most sizes; for seven times a power of two (56, 112, 224) one more is independent.
    """
    return min(MAX_FREQUENCIES, floor(log2(size))) if frequencies is None else frequencies


def encoded_axis(size: int, frequencies: int, like: Tensor) -> Tensor:
    """``sin(2^l pi c), cos(2^l pi c)`` at the voxel centres c of an axis from -1 to 1.

    Shape: (size, 2 frequencies), octave by octave.
    """
    # Angles in double precision: 2^9 pi c has lost three digits in single precision.
    kind = torch.float32 if like.device.type == "mps" else torch.float64
    centres = (2 * torch.arange(size, device=like.device, dtype=kind) + 1) / size - 1
    angles = centres[:, None] * (pi * 2.0 ** torch.arange(frequencies, device=like.device, dtype=kind))
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1).to(like.dtype)


@dataclass(frozen=True, kw_only=True)
class Level:
    """A map that points look up.

    Args:
        values: (B, C, voxels) of a map that is looked up as it is, (B, voxels, C) of a product.
        size: Voxels per axis.
        stride: Voxels of the patch per voxel of the map, per axis.
    """

    values: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Maps:
    """What all points of a patch share, see `PointDecoder.prepare`.

    Args:
        fine: Feature maps that are looked up as they are.
        product: Sum of products of the others with the weights, on the finest grid among them.
        tables: Encoding per axis, (size, 2 octaves).
        weights: Effective weights of all layers.
        fine_weight, bias: Those of the product with looked-up features and encoding; None where nothing is split.
    """

    fine: list[Level]
    product: Level | None
    tables: list[Tensor]
    weights: list[Tensor]
    fine_weight: Tensor | None = None
    bias: Tensor | None = None


class PointDecoder(nn.Module):
    """``h_1 = a(W_1 z + b_1)``, ``h_i = a(W_i h_(i-1) + b_i)``, at layer depth / 2 ``[h, z]`` for h; then the heads.

    z(p) = [F_0(p // s_0), ..., F_n(p // s_n), g(p)]: each feature map at the voxel that holds p, and the positional
    encoding. a: ReLU and dropout.

    Split (exact): ``W z = sum_l (W_l F_l)(p // s_l) + W_g g(p)``. Floor divisions nest, so the maps of few voxels are
    multiplied once and summed from the coarsest up, ``S_l = W_l F_l + up(S_(l+1))``: one lookup for all of them. The
    other maps and the encoding are looked up and multiplied together: their products, for every voxel or per axis,
    would be wider than they are. The same product serves both layers that see z.

    Args:
        channels: Channels of the feature maps, finest first.
        strides: Cumulative, of each map per axis; each a multiple of the one before.
        num_classes: Heads.
        width, depth: Units and number of the hidden layers.
        frequencies: Octaves per axis; None: as many as differ on the patch, at most 10.
        dropout: Probability, in training.
        split: False looks up all maps and concatenates: same weights, the reference of tests.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[Sequence[int]],
        num_classes: int,
        *,
        width: int,
        depth: int,
        frequencies: int | None,
        dropout: float,
        split: bool,
    ) -> None:
        super().__init__()
        self.channels = list(channels)
        self.strides = [tuple(stride) for stride in strides]
        self.frequencies = frequencies
        self.encoded = 2 * (MAX_FREQUENCIES if frequencies is None else frequencies)  # columns per axis
        self.split = split
        self.width = width
        self.skip = depth // 2 - 1  # index of the layer that sees the input again; -1: none
        d_in = sum(self.channels) + len(self.strides[0]) * self.encoded
        if self.skip == 0:
            self.skip = -1
        self.layers = nn.ModuleList(
            WeightNormLinear((width if i else d_in) + (d_in if i == self.skip else 0), width) for i in range(depth)
        )
        self.activation = ReLUDropout(dropout)
        self.seg_layers = SegmentationHeads(width, num_classes)

    def forward(self, features: Sequence[Tensor], points: Tensor, patch: Sequence[int]) -> Tensor:
        """Return logits at points.

        Shape: maps (B, C_l, *patch / stride), points (B, K, dims) -> (B, num_classes, K).
        """
        return self.decode(self.prepare(features, patch, points.shape[1]), points)

    def prepare(self, features: Sequence[Tensor], patch: Sequence[int], n_points: int) -> Maps:
        """Compute what all points of a patch share.

        Args:
            features: Maps, finest first.
            patch: Voxels per axis.
            n_points: Points that will look maps up; a map is multiplied as a whole where it has fewer voxels.
        """
        weights = [layer.weight() for layer in self._layers()]
        levels = [
            Level(values=f.flatten(2), size=tuple(f.shape[2:]), stride=s)
            for f, s in zip(features, self.strides, strict=True)
        ]
        used = [octaves(n, self.frequencies) for n in patch]
        encodings = [encoded_axis(n, k, weights[0]) for n, k in zip(patch, used, strict=True)]
        if not self.split:
            padded = [F.pad(e, (0, self.encoded - e.shape[1])) for e in encodings]
            return Maps(fine=levels, product=None, tables=padded, weights=weights)
        weight, bias = self._input_product(weights)
        n_fine = self._first_multiplied(levels, n_points)
        per_level = weight[:, : sum(self.channels)].split(self.channels, 1)
        product = _telescope(levels[n_fine:], per_level[n_fine:])
        columns = weight[:, sum(self.channels) :].split(self.encoded, 1) if self.encoded else ()
        parts = [*per_level[:n_fine], *(c[:, : 2 * k] for c, k in zip(columns, used, strict=False))]
        fine_weight = torch.cat(parts, 1) if parts else None
        return Maps(
            fine=levels[:n_fine], product=product, tables=encodings, weights=weights, fine_weight=fine_weight, bias=bias
        )

    def decode(self, maps: Maps, points: Tensor) -> Tensor:
        """Return logits at points.

        Shape: (B, K, dims) -> (B, num_classes, K).
        """
        z = self._products(maps, points) if self.split else _looked_up(maps, points)
        h = z[..., : self.width] if self.split else F.linear(z, maps.weights[0], self._layers()[0].bias)
        h = self.activation(h)
        for i, (layer, weight) in enumerate(zip(self._layers(), maps.weights, strict=True)):
            if i == 0:
                continue
            if i != self.skip:
                h = F.linear(h, weight, layer.bias)
            elif self.split:
                h = F.linear(h, weight[:, : self.width], layer.bias).add_(z[..., self.width :])
                del z
            else:
                h = F.linear(torch.cat([h, z], -1), weight, layer.bias)
            h = self.activation(h)
        return self.seg_layers(h).transpose(1, 2)

    def _layers(self) -> list[WeightNormLinear]:
        return list(self.layers)  # type: ignore[arg-type]

    def _input_product(self, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Weights and bias of both products with z, stacked: (width or 2 width, d_in)."""
        bias: Tensor = self._layers()[0].bias
        if self.skip < 0:
            return weights[0], bias
        stacked = torch.cat([weights[0], weights[self.skip][:, self.width :]])
        return stacked, torch.cat([bias, torch.zeros_like(bias)])  # the second product has its bias already

    def _first_multiplied(self, levels: list[Level], n_points: int) -> int:
        """Index of the finest of the maps that are multiplied as a whole."""
        width = self.width if self.skip < 0 else 2 * self.width
        first = len(levels)
        for i in reversed(range(len(levels))):
            voxels = prod(levels[i].size)
            if voxels > n_points or voxels * width > _LARGEST_PRODUCT:
                break
            first = i
        return first

    def _products(self, maps: Maps, points: Tensor) -> Tensor:
        """W z + b for both layers that see z. Shape: (B, K, dims) -> (B, K, width or 2 width)."""
        terms: list[Tensor] = []
        if maps.fine_weight is not None:
            terms.append(F.linear(_looked_up(maps, points), maps.fine_weight, maps.bias))
        if maps.product is not None:
            rows = flat_index(points, maps.product.size, maps.product.stride)
            offsets = torch.arange(len(rows), device=rows.device)[:, None] * maps.product.values.shape[1]
            terms.append(_rows(maps.product.values.flatten(0, 1), rows + offsets))
        if maps.fine_weight is None and maps.bias is not None:
            terms[0] = terms[0] + maps.bias.to(terms[0].dtype)
        return _sum(terms)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    """Sum of tensors, in the memory of the first: these are the largest of a step, and nothing keeps them."""
    total = terms[0]
    for term in terms[1:]:
        total = total.add_(term)
    return total


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table. Shape: (n, C), (B, K) -> (B, K, C)."""
    return table.index_select(0, index.flatten()).view(*index.shape, table.shape[1])


def _looked_up(maps: Maps, points: Tensor) -> Tensor:
    """Features of the maps at the points, and their encoding. Shape: (B, K, dims) -> (B, K, sum of C)."""
    found = []
    for level in maps.fine:
        index = flat_index(points, level.size, level.stride)[:, None]
        index = index.expand(-1, level.values.shape[1], -1)
        found.append(level.values.gather(2, index).transpose(1, 2))
    encoded = [_rows(table, points[..., axis]) for axis, table in enumerate(maps.tables)]
    return torch.cat([*found, *encoded], -1)


def _telescope(levels: Sequence[Level], weights: Sequence[Tensor]) -> Level | None:
    """``S_l = W_l F_l + up(S_(l+1))`` from the coarsest map to the finest of those given."""
    total: Tensor | None = None
    for i in reversed(range(len(levels))):
        level = levels[i]
        product = F.linear(level.values.transpose(1, 2), weights[i])  # (B, voxels, width)
        product = product.view(len(product), *level.size, -1)
        if total is not None:
            step = [c // f for c, f in zip(levels[i + 1].stride, level.stride, strict=True)]
            product = product + nearest(total, level.size, step, first_axis=1)
        total = product
    if total is None:
        return None
    return Level(values=total.flatten(1, -2), size=levels[0].size, stride=levels[0].stride)


def nearest(coarse: Tensor, size: Sequence[int], step: Sequence[int], first_axis: int) -> Tensor:
    """Give every voxel p of a grid of `size` the value of the coarse voxel p // step."""
    for axis, (n, s) in enumerate(zip(size, step, strict=True), start=first_axis):
        if s > 1:
            coarse = coarse.repeat_interleave(s, axis, output_size=s * coarse.shape[axis]).narrow(axis, 0, n)
    return coarse
