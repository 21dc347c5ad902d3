"""Implicit U-Net: a convolutional encoder, and a decoder that is asked at points.

Naval Marimont and Tarroni 2022, "Implicit U-Net for Volumetric Medical Image Segmentation" (MIUA),
https://arxiv.org/abs/2206.15217. Different from the paper: sizes, strides, kernels and norm come from nnU-Net's plans;
the decoder's input product is split over the feature maps (exact); points are voxels; prediction looks a second time
where a coarse mesh could miss something. docs/methods/implicit.md holds equations and decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from nnunet_ext.architectures.common.norm_statistics import NormStatistics
from nnunet_ext.architectures.common.onednn import is_exporting, is_transformed
from nnunet_ext.architectures.common.plan_arguments import PlanArguments
from nnunet_ext.architectures.common.plan_sizes import (
    check_depths,
    check_stages,
    check_weights,
    patch_divisors,
    per_stage_and_axis,
)
from nnunet_ext.architectures.common.plan_values import options_checked
from nnunet_ext.architectures.implicit.decoder import Maps, PointDecoder
from nnunet_ext.architectures.implicit.point_sampling import points_per_patch
from nnunet_ext.architectures.implicit.sparse_inference import Mesh, Refinement, SparsePrediction, dense_logits

CONVS_PER_STAGE = (2, 2, 4, 4, 1)  # of the paper; further stages have one


class ImplicitUNet(nn.Module):
    """Implicit U-Net (Naval Marimont, Tarroni 2022): trained on points, predicts sparsely; 0.41x of the parameters.

    `forward(x)` gives dense logits; in eval mode it decodes a coarse mesh and then what the mesh leaves open.
    `forward(x, points=p)` gives logits at voxels: this is how it is trained. Arguments that are not listed mean what
    they mean in nnU-Net's plans; depths of the plans (`n_conv_per_stage`, `n_blocks_per_stage`, the decoder's) are
    not used.

    Args:
        input_channels: Channels of the image.
        num_classes: Channels of the logits.
        deep_supervision: There is none; accepted because nnU-Net passes it.
        decoder_width: Units per hidden layer (paper: 512).
        decoder_depth: Hidden layers (paper: 8).
        frequencies: Octaves of the positional encoding per axis (paper: 10). None: min(10, floor(log2 size)).
        mesh_spacing: Voxels between mesh points along the finest axes (paper: 4); smaller along axes that the encoder
            strides later and along axes of fewer than eight cells. Or one number per axis.
        dropout: Probability in the decoder (paper: 0.2).
        split: Split the decoder's input product; False concatenates: same weights, the reference of tests.
        sparse: Predict sparsely in eval mode; False decodes every voxel.
        n_points: Voxels per patch in training (paper: 30,000), at most a quarter of the patch.
        max_stride: Leading stages of the plans are taken while no axis is strided by more, in voxels (paper: 16).
        convs_per_stage: Convolutions per stage of the encoder; None: 2, 2, 4, 4, then 1 (paper).
        smooth: Average the logits over 3 voxels per axis (paper); can erase small objects.
        margin, threshold, second_look, dense_above, chunk_size: See
            `nnunet_ext.architectures.implicit.sparse_inference.Refinement`.

    Shape: (B, input_channels, *patch) -> (B, num_classes, *patch);
        with points (B, K, dims), int64 voxels of the patch -> (B, num_classes, K).

    Raises:
        ValueError: lists that do not fit n_stages, even kernels, options out of their range, points of another shape
            or type.
    """

    @options_checked
    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        deep_supervision: bool = False,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        frequencies: int | None = None,
        mesh_spacing: int | Sequence[int] = 4,
        dropout: float = 0.2,
        split: bool = True,
        sparse: bool = True,
        n_points: int = 30_000,
        max_stride: int = 16,
        convs_per_stage: int | Sequence[int] | None = None,
        smooth: bool = False,
        margin: float = 0.5,
        threshold: float = 0.05,
        second_look: float = 0.25,
        dense_above: float = 0.5,
        chunk_size: int | None = None,
        **plan_arguments: Any,
    ) -> None:
        super().__init__()
        _check_options(decoder_width, decoder_depth, frequencies, mesh_spacing, dropout, n_points, max_stride)
        plan = PlanArguments.of(plan_arguments)
        check_stages("U-Net", plan.n_stages, least=1)
        self.dim, kernels = plan.dim, plan.kernels()
        steps = per_stage_and_axis("strides", plan.conv_op, plan.strides, plan.n_stages)
        cumulative = [tuple(patch_divisors(steps[: i + 1])) for i in range(plan.n_stages)]
        n_used = max(1, sum(max(stride) <= max_stride for stride in cumulative))
        features, depths = plan.features()[:n_used], _depths(convs_per_stage, n_used)
        check_weights(features, kernels[:n_used], steps[:n_used], depths)
        plan.check_nonlin(features)
        self.encoder = PlainConvEncoder(
            input_channels,
            n_used,
            features,
            plan.conv_op,
            kernels[:n_used],
            steps[:n_used],
            depths,
            plan.conv_bias,
            plan.norm_op,
            plan.norm_op_kwargs,
            plan.dropout_op,
            plan.dropout_op_kwargs,
            plan.nonlin,
            plan.nonlin_kwargs,
            return_skips=True,
        )
        # Not called `decoder`: there is nothing to switch deep supervision of.
        self.point_decoder = PointDecoder(
            features,
            cumulative[:n_used],
            num_classes,
            width=decoder_width,
            depth=decoder_depth,
            frequencies=frequencies,
            dropout=dropout,
            split=split,
        )
        self.input_channels, self.num_classes = input_channels, num_classes
        self.n_points, self.sparse, self.smooth = n_points, sparse, smooth
        self.mesh_spacing = _spacing(mesh_spacing, cumulative)
        self.refinement = Refinement(
            margin=margin, threshold=threshold, second_look=second_look, dense_above=dense_above, chunk_size=chunk_size
        )
        self._assumed_share: float | None = None
        self._refined_cells = self._cells = 0
        self.coarsest_stride, self.norm_statistics = cumulative[n_used - 1], NormStatistics.of(self)

    def forward(self, x: Tensor, points: Tensor | None = None) -> Tensor:
        """Return dense logits, or those at points."""
        if not is_exporting():
            coarsest = [-(-n // stride) for n, stride in zip(x.shape[2:], self.coarsest_stride, strict=True)]
            self.norm_statistics.check(x, coarsest, self.training)
        return self._decode(self.encoder(x), points, tuple(x.shape[2:]))

    @torch.compiler.disable  # sizes depend on the data; the encoder is compiled
    def _decode(self, features: list[Tensor], points: Tensor | None, patch: tuple[int, ...]) -> Tensor:
        if points is not None:
            self._check_points(points, len(features[0]))
            return self.point_decoder(features, points, patch)
        samples = [[f[i : i + 1] for f in features] for i in range(len(features[0]))]
        logits = torch.stack([self._dense(sample, patch) for sample in samples])
        return self._smoothed(logits) if self.smooth else logits

    def _smoothed(self, logits: Tensor) -> Tensor:
        """Mean over 3 voxels per axis, fewer at borders, also where an axis has fewer."""
        pool = F.avg_pool2d if self.dim == 2 else F.avg_pool3d
        inside = torch.ones_like(logits[:1, :1])
        margin = [1, 1] * self.dim
        return pool(F.pad(logits, margin), 3, 1) / pool(F.pad(inside, margin), 3, 1)

    def _dense(self, features: list[Tensor], patch: tuple[int, ...]) -> Tensor:
        """Logits of all voxels of one sample. Shape: maps (1, C_l, *) -> (num_classes, *patch)."""
        # What sparse prediction decodes depends on the data, which neither export nor `torch.func` can follow.
        sparsely = self.sparse and not self.training and not is_exporting() and not is_transformed()
        # Sparse prediction asks for a few voxels in a hundred: larger maps are not worth a whole product.
        maps: Maps = self.point_decoder.prepare(features, patch, prod(patch) // (32 if sparsely else 2))

        def decode(voxels: Tensor) -> Tensor:
            return self.point_decoder.decode(maps, voxels[None])[0]

        if not sparsely:
            device = features[0].device
            return dense_logits(decode, patch, self.refinement.chunk_on(device), device)
        mesh = Mesh.fitting(patch, self.mesh_spacing)
        regions = self.point_decoder.seg_layers.regions or self.num_classes == 1
        prediction = SparsePrediction(decode, mesh, self.refinement, regions, self._assumed_share)
        logits = prediction.logits(features[0][0])
        self._refined_cells += prediction.refined
        self._cells += prod(mesh.size)
        return logits

    def _check_points(self, points: Tensor, batch: int) -> None:
        if points.ndim != 3 or len(points) != batch or points.shape[2] != self.dim or points.shape[1] == 0:
            raise ValueError(
                f"points must be ({batch}, K, {self.dim}) with K > 0, got {tuple(points.shape)}: "
                "give voxel indices of the patch for each sample."
            )
        if points.dtype != torch.int64:
            raise ValueError(f"points must be int64 voxel indices, got {points.dtype}: round and convert them.")

    def refined_share(self, reset: bool = False) -> float | None:
        """Share of the cells that sparse prediction decoded voxel by voxel since the last reset; None: no prediction.

        Args:
            reset: Start again.
        """
        share = self._refined_cells / self._cells if self._cells else None
        if reset:
            self._refined_cells = self._cells = 0
        return share

    def assume_refined_share(self, share: float | None) -> None:
        """Refine this share of the cells, whichever they are, for benchmarks and counts. None: what needs it."""
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"The assumed share must lie in 0 to 1, got {share}.")
        self._assumed_share = share

    def training_inputs(self, x: Tensor) -> dict[str, Tensor]:
        """Arguments that training gives in addition to the image, for benchmarks: uniform points."""
        patch = x.shape[2:]
        shape = (len(x), points_per_patch(self.n_points, patch))
        return {"points": torch.stack([torch.randint(n, shape, device=x.device) for n in patch], -1)}

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initialise convolutions as nnU-Net does (He et al. 2015); the decoder is so from its construction."""
        InitWeights_He(1e-2)(module)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that training keeps per sample: the encoder's, as nnU-Net counts them, and one per unit and point.

        Args:
            input_size: Voxels per axis.
        """
        units = self.point_decoder.width * len(self.point_decoder.layers)
        points = points_per_patch(self.n_points, input_size)
        return int(self.encoder.compute_conv_feature_map_size(input_size)) + points * units


def _depths(convs_per_stage: int | Sequence[int] | None, n_stages: int) -> list[int]:
    """Convolutions of each encoder stage; the last number is that of all further ones."""
    given = CONVS_PER_STAGE if convs_per_stage is None else convs_per_stage
    depths = [int(n) for n in (given if isinstance(given, Sequence) else [given])]
    if min(depths, default=0) < 1:
        raise ValueError(f"convs_per_stage must be at least 1, got {depths}: leave it out for those of the paper.")
    check_depths(depths, depths)
    return (depths + [depths[-1]] * n_stages)[:n_stages]


def _spacing(mesh_spacing: int | Sequence[int], cumulative: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Mesh spacing per axis: that of the first map coarse enough, so axes of thick slices have a finer mesh."""
    if not isinstance(mesh_spacing, int):
        if len(mesh_spacing) != len(cumulative[0]):
            raise ValueError(
                f"mesh_spacing needs {len(cumulative[0])} numbers, one per axis, got {list(mesh_spacing)}: or give one "
                "for all."
            )
        return tuple(mesh_spacing)
    coarse = next((s for s in cumulative if max(s) >= mesh_spacing), None)
    if coarse is None:
        return (mesh_spacing,) * len(cumulative[0])
    return tuple(min(mesh_spacing, s) for s in coarse)


def _check_options(
    width: int,
    depth: int,
    frequencies: int | None,
    mesh_spacing: int | Sequence[int],
    dropout: float,
    n_points: int,
    max_stride: int,
) -> None:
    """Refuse options out of their range."""
    spacings = [mesh_spacing] if isinstance(mesh_spacing, int) else list(mesh_spacing)
    ranges = {
        "decoder_width": (width, 1, 4096),
        "decoder_depth": (depth, 1, 64),
        "frequencies": (0 if frequencies is None else frequencies, 0, 64),
        "mesh_spacing": (min(spacings, default=1), 1, None),
        "n_points": (n_points, 1, None),
        "max_stride": (max_stride, 1, None),
    }
    for name, (value, least, most) in ranges.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
        if most is not None and value > most:
            raise ValueError(f"{name} must be at most {most}, got {value}: leave it out for that of the paper.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in 0 to below 1, got {dropout}.")
