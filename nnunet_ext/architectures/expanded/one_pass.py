"""meU-net in one pass: the finest level is trained on a part of a patch with what coarser levels see of all of it.

Wang, Blackie, Miguel-Aliaga, Bai 2022, "Memory-efficient Segmentation of High-resolution Volumetric MicroCT Images"
(MIDL), train the finest level on the small patch alone, where coarser levels see no more than that. Different from the
paper: one pass of the network on the large patch, of whose finest level only a part has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from nnunet_ext.architectures.expanded.partial_pass import (
    check_network,
    coarser_levels,
    evaluating,
    in_groups,
    of_levels,
    replaced,
    split,
)
from nnunet_ext.architectures.expanded.statistics import SharedStatistics


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of a patch.

    Args:
        start: Its first voxel per axis.
        size: Its voxels per axis.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]

    def of(self, x: Tensor) -> Tensor:
        """Cut it out. Shape: (B, C, *patch) -> (B, C, *size)."""
        return x[self.slices]

    def widened(self, rim: Sequence[int], steps: Sequence[int], whole: Sequence[int]) -> Region:
        """With a rim, rounded up to multiples of `steps`, moved into the whole patch: its size is always the same."""
        start, size = [], []
        for a, n, r, step, end in zip(self.start, self.size, rim, steps, whole, strict=True):
            wide = ceil(r / step) * step
            size.append(min(end, n + 2 * wide))
            start.append(min(max(0, a - wide), end - size[-1]))
        return Region(start=tuple(start), size=tuple(size))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Its voxels in (B, C, *patch)."""
        per_axis = (slice(start, start + size) for start, size in zip(self.start, self.size, strict=True))
        return (slice(None), slice(None), *per_axis)

    def mask(self, whole: Sequence[int], like: Tensor) -> Tensor:
        """One inside, zero around, (1, 1, *whole)."""
        mask = torch.zeros((1, 1, *whole), dtype=torch.float32, device=like.device)
        mask[self.slices] = 1
        return mask

    def within(self, other: Region) -> Region:
        """The same voxels counted from the first of a region that holds them."""
        return replace(self, start=tuple(a - b for a, b in zip(self.start, other.start, strict=True)))

    def coarser(self, stride: Sequence[int]) -> Region:
        """The same part of a feature map at this stride."""
        start, size = (tuple(n // s for n, s in zip(ns, stride, strict=True)) for ns in (self.start, self.size))
        return Region(start=start, size=size)


Parts = Mapping[tuple[int, ...], Region]  # by the voxels per axis of what holds them


class OnePass(nn.Module):
    """A U-Net on a large patch kP whose finest level keeps feature maps of a part P only.

    What it computes on P is what the network computes there on kP. With f the finest level of the encoder and the
    first block of the second, which holds the strided convolution, and g the finest level of the decoder:

        1. f on kP, without gradient, some samples at a time
        2. f on P, with gradient; takes its place in what 1 gave to level 2
        3. levels 2 and coarser on kP, with gradient
        4. g on kP, without gradient, for the statistics of its norms; g on P, with gradient

    f and g see P with a rim as wide as their convolutions reach, and their instance norms take the statistics of kP.
    The gradient is that of the network on kP with f and g cut outside of P, but for what passes through statistics,
    for which P stands (`nnunet_ext.architectures.expanded.statistics`). Weights are the network's own.

    Args:
        network: A U-Net of at least three stages, see `ExpandedPass`.
        standard_patch: Voxels per axis of kP -> of P.
        deep_supervision: Return the logits of all levels from the second on, not only the second's.
        whole_statistics: False: norms of f and g take the statistics of P with its rim, and 4 runs on P only.

    Shape: (B, C_in, *kP) -> list of (B, num_classes, *P), then (B, num_classes, *kP / stride of the level).

    Raises:
        ValueError: the network is not built of such an encoder and decoder.
    """

    def __init__(
        self,
        network: Any,
        standard_patch: Callable[[Sequence[int]], Sequence[int]],
        deep_supervision: bool = False,
        whole_statistics: bool = True,
    ) -> None:
        super().__init__()
        check_network(network)
        self.trained_network = network
        self._standard_patch = standard_patch
        self._deep_supervision, self._whole_statistics = deep_supervision, whole_statistics
        shallow, encoder = split(network.encoder)
        is_chain = hasattr(network.encoder, "transitions")
        down: _ChainDown | _HostDown = (_ChainDown if is_chain else _HostDown)(network, shallow)
        up: _ChainUp | _HostUp = (_ChainUp if is_chain else _HostUp)(network)
        self._stride, self._decoder_rim = up.stride, _reach(up.modules(), len(up.stride))
        self._rim = self._rim_of_image(shallow)
        self._down, self._up = SharedStatistics(down), SharedStatistics(up)
        self._deep = coarser_levels(network, encoder, deep_supervision)
        *coarser, self.head = network.decoder.seg_layers[:-1]
        # The last features in place of the last logits.
        self._deep.decoder.seg_layers = nn.ModuleList([*coarser, nn.Identity()])
        self._run: Callable[[nn.Module], Any] = _itself

    def forward(self, x: Tensor, part: Region | None = None) -> list[Tensor]:
        """Return logits of P, then, largest first, of the levels from the second on.

        Args:
            x: The whole patch kP.
            part: P; None: the centre.
        """
        whole, stride = tuple(x.shape[2:]), self._stride
        part = part or self.centre(whole)
        skipped = part.widened(self._decoder_rim, stride, whole)
        seen = part.widened(self._rim, stride, whole)
        inside = part.within(seen)

        below_whole = self._below(x, {seen.size: inside, seen.coarser(stride).size: inside.coarser(stride)})
        skip, below = self._run(self._down.of_part)(seen.of(x))
        part.coarser(stride).of(below_whole).copy_(inside.coarser(stride).of(below))
        found = self._run(self._deep)(below_whole)
        features, *logits = found if self._deep_supervision else [found]
        if self._whole_statistics:
            self._find_statistics_above(x, features.detach(), {skipped.size: part.within(skipped)})
        finest = self._run(self._up.of_part)(skipped.within(seen).of(skip), skipped.coarser(stride).of(features))
        return [part.within(skipped).of(finest), self.head(features), *logits]

    def centre(self, whole: Sequence[int]) -> Region:
        """P in the middle of a patch of this size, at a voxel where one of level 2 starts."""
        return self._placed(whole, [0.5] * len(whole))

    def anywhere(self, whole: Sequence[int]) -> Region:
        """P at a random place of a patch of this size, drawn by PyTorch's generator of the CPU.

        Per axis its middle is uniform on the patch, and P then moved inside: voxels at the border are as often in P as
        they can be, and for k up to 2 the middle of the patch always is.
        """
        return self._placed(whole, torch.rand(len(whole)).tolist())

    def _placed(self, whole: Sequence[int], middle: Sequence[float]) -> Region:
        size = tuple(self._standard_patch(whole))
        start = (
            int(min(max(0, (m * n - p / 2) // s), (n - p) // s)) * s
            for m, n, p, s in zip(middle, whole, size, self._stride, strict=True)
        )
        return Region(start=tuple(start), size=size)

    def _rim_of_image(self, shallow: Sequence[nn.Module]) -> tuple[int, ...]:
        """What the skip of P with the decoder's rim and what enters level 2 in P see beyond P."""
        dim = len(self._stride)
        *encoder, _ = shallow
        decoder = (ceil(n / s) * s for n, s in zip(self._decoder_rim, self._stride, strict=True))
        for_skip = (a + b for a, b in zip(decoder, _reach(encoder, dim), strict=True))
        return tuple(max(both) for both in zip(for_skip, _reach(shallow, dim), strict=True))

    def _below(self, x: Tensor, parts: Parts) -> Tensor:
        """What the finest level gives to the second, without gradient."""
        found, below = [], []
        with torch.no_grad(), evaluating(self._down.of_whole):
            for samples in in_groups(x, self._down.of_whole):
                below.append(self._run(self._down.of_whole)(samples)[1])
                found.append(self._down.found())
        if self._whole_statistics:
            self._down.use(found, {size: part.mask(size, x) for size, part in parts.items()})
        return torch.cat(below)

    def _find_statistics_above(self, x: Tensor, features: Tensor, parts: Parts) -> None:
        """Of the finest level of the decoder; its skip is computed once more and not kept until now."""
        found = []
        groups = in_groups(x, self._down.of_whole)
        with torch.no_grad(), evaluating(self._down.of_whole), evaluating(self._up.of_whole):
            for samples, inner in zip(groups, features.split(len(groups[0])), strict=True):
                self._run(self._up.of_whole)(self._run(self._down.of_whole)(samples)[0], inner)
                found.append(self._up.found())
        self._up.use(found, {size: part.mask(size, x) for size, part in parts.items()})

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the parts, and not the pass as a whole."""
        self.compile_levels(*args, **options)

    def compile_levels(self, *args: Any, **options: Any) -> None:
        """Compile what nnU-Net compiles of its network; modes are switched outside of it.

        Args:
            args, options: Of `torch.compile`.
        """
        parts = (self._deep, *(form for level in (self._down, self._up) for form in (level.of_whole, level.of_part)))
        compiled = {
            part: part if isinstance(part, (_ChainDown, _ChainUp)) else torch.compile(part, *args, **options)
            for part in parts
        }
        self._run = compiled.__getitem__


def _itself(module: nn.Module) -> nn.Module:
    return module


class _HostDown(nn.Module):
    """The finest level of nnU-Net's encoder and what leads out of it: from the image to the skip and to level 2."""

    def __init__(self, network: Any, shallow: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoder = replaced(network.encoder, stages=nn.Sequential(*shallow[-2:]))
        self._recomputation = _at_once(network)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the encoder, or its stages as they recompute."""
        if self._recomputation is None or not self._recomputation.applies_to(self):
            skip, below = self.encoder(x)
        else:
            (skip,), (below,) = self._recomputation.encode(self.encoder, x)
        return skip, below


class _HostUp(nn.Module):
    """The finest level of nnU-Net's decoder: from the skip and the features of level 2 to the logits."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        children = {name: None for name in network.decoder._modules if name == "encoder"}
        self.decoder = replaced(network.decoder, **children, **of_levels(network.decoder, slice(-1, None)))
        self.decoder.deep_supervision = False
        self.stride = tuple(self.decoder.transpconvs[0].stride)
        self._recomputation = _at_once(network)

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        """Run the decoder, or its stage as it recomputes."""
        if self._recomputation is None or not self._recomputation.applies_to(self):
            logits: Tensor = self.decoder([skip, below])
        else:
            logits = self._recomputation.decode(self.decoder, [[skip], [below]])
        return logits


def _at_once(network: Any) -> Any:
    """How a network recomputes, without groups of samples: statistics are those of all; None: it does not."""
    recomputation = getattr(network, "recomputation", None)
    return None if recomputation is None else replace(recomputation, apart=False)


class _ChainDown(nn.Module):
    """The finest level of `ReversibleUNet`'s encoder; its couplings recompute themselves and are not compiled."""

    def __init__(self, network: Any, shallow: Sequence[nn.Module]) -> None:
        super().__init__()
        self.enter, stage, self.out = shallow
        self.stage = _ungrouped(stage)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the stage."""
        skip = self.stage(self.enter(x))
        return skip, self.out(skip)


class _ChainUp(nn.Module):
    """The finest level of `ReversibleUNet`'s decoder."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        decoder = network.decoder
        self.transition, self.head = decoder.transitions[-1], decoder.seg_layers[-1]
        self.stage = _ungrouped(decoder.stages[-1])
        self.stride = tuple(self.transition.stride)

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        """Run the stage."""
        logits: Tensor = self.head(self.stage(self.transition(below) + skip))
        return logits


def _ungrouped(stage: Any) -> Any:
    """A reversible stage that takes no groups of samples: statistics are those of all."""
    twin = replaced(stage)
    twin.group_elements = None
    return twin


def _reach(modules: Iterable[nn.Module], dim: int) -> tuple[int, ...]:
    """How many voxels of the input to each side the convolutions of modules see that run one after the other.

    At most so many: of paths side by side all convolutions count.
    """
    reach, scale = [0] * dim, [1] * dim
    for part in dict.fromkeys(part for module in modules for part in module.modules()):
        if isinstance(part, _ConvNd) and not isinstance(part, _ConvTransposeNd):
            for axis in range(dim):
                reach[axis] += scale[axis] * (part.kernel_size[axis] // 2) * part.dilation[axis]
                scale[axis] *= part.stride[axis]
    return tuple(reach)
