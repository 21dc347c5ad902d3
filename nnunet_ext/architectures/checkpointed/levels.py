"""Encoder and decoder of nnU-Net's networks, run level by level so that training keeps what leads between levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nnunet_ext.architectures.checkpointed.repeated import repeated
from nnunet_ext.architectures.checkpointed.stages import Pending, blocks_of, joined, through
from nnunet_ext.architectures.reversible.chain import group_size
from nnunet_ext.architectures.reversible.recomputation import can_recompute
from nnunet_ext.architectures.reversible.stages import GROUP_ELEMENTS, samples_are_independent

Recompute = Literal["stages", "norms", "finest"]
Groups = list[Tensor]  # a feature map: all samples, or several groups of them

_BLOCKS = 2  # of a stage whose samples are apart: more of them at once need more memory than their inputs
_FINEST = 2  # stages of the encoder; the second keeps more than all coarser ones together


@dataclass(frozen=True, kw_only=True)
class Recomputation:
    """What the backward pass computes once more.

    Args:
        recompute: "stages": all but what leads from level to level. "norms": all but convolutions. "finest": what
            "stages" recomputes of the finest levels, what "norms" does of others.
        apart: Whether large feature maps are run in groups of samples, which are never joined.
    """

    recompute: Recompute
    apart: bool

    @classmethod
    def of(cls, encoder: Any, recompute: Recompute, samples_apart: bool | None) -> Recomputation:
        """Check the options of a network.

        Args:
            encoder: nnU-Net's.
            recompute: "stages", "norms" or "finest".
            samples_apart: None: where the norm treats samples apart.

        Raises:
            ValueError: another word, or samples apart with a norm over the batch.
        """
        if recompute not in get_args(Recompute):
            raise ValueError(f'recompute must be "stages", "norms" or "finest", got {recompute!r}.')
        independent = samples_are_independent(encoder.norm_op, encoder.norm_op_kwargs or {})
        if samples_apart and not independent:
            raise ValueError(
                f"samples_apart needs a norm that treats samples apart, got {encoder.norm_op.__name__}, whose "
                "statistics are those of the batch: leave it None, or plan with instance norm."
            )
        return cls(recompute=recompute, apart=independent if samples_apart is None else samples_apart)

    def applies_to(self, network: nn.Module) -> bool:
        """Whether this is a pass of training that can be repeated."""
        if not (network.training and can_recompute()):
            return False
        # PyTorch's checkpoint gives RReLU wrong gradients: its noise is saved before it is drawn. Compiled by 2.5 (2.11
        # does not), it counts running statistics twice.
        counts_twice = torch.compiler.is_compiling() and torch.__version__ < "2.9"
        kinds = (nn.RReLU, _BatchNorm) if counts_twice else (nn.RReLU,)
        return not any(isinstance(part, kinds) for part in network.modules())

    def encode(self, encoder: Any, x: Tensor) -> list[Groups]:
        """Feature maps of all stages, finest first."""
        stem = getattr(encoder, "stem", None)
        before = [] if stem is None else blocks_of(stem)
        groups = self._grouped(encoder, x)
        maps = []
        for i, stage in enumerate(encoder.stages):
            blocks, before = [*before, *blocks_of(stage)], []
            step = _BLOCKS if len(groups) > 1 else max(1, len(blocks))
            for start in range(0, len(blocks), step):
                part = blocks[start : start + step]
                run = partial(self._down, part, i < _FINEST)
                groups = [self._level(run, part, group, is_finest=i < _FINEST) for group in groups]
            groups = _joined_if_small(groups)
            maps.append(groups)
        return maps

    def decode(self, decoder: Any, maps: Sequence[Groups], others: Sequence[Tensor] = ()) -> Any:
        """Logits, with deep supervision a list of them, largest first.

        Args:
            decoder: nnU-Net's, whose forward pass this is.
            maps: What `encode` gives.
            others: One more map for each level of the decoder, finest first, to join after the skip.
        """
        *skips, groups = maps
        logits: list[Tensor] = []
        last = len(decoder.stages) - 1
        levels = zip(decoder.transpconvs, decoder.stages, decoder.seg_layers, reversed(skips), strict=True)
        for i, (up, stage, head, skip) in enumerate(levels):
            sizes = [len(group) for group in skip]
            inputs = [groups if len(groups) == len(skip) else _split(groups[0], sizes), skip]
            if others:
                inputs.append(_split(others[last - i].to(skip[0].dtype), sizes))
            run = partial(self._up, up, stage, head, decoder.deep_supervision, i == last)
            modules = [up, stage, head]
            found = [self._level(run, modules, *tensors, is_finest=i == last) for tensors in zip(*inputs, strict=True)]
            groups = [features for features, *_ in found]
            if decoder.deep_supervision or i == last:
                logits.append(_whole([outputs[-1] for outputs in found]))
        return logits[::-1] if decoder.deep_supervision else logits[0]

    def _level(self, run: Callable[..., Any], modules: Sequence[nn.Module], *inputs: Tensor, is_finest: bool) -> Any:
        return repeated(run, modules, *inputs) if self._is_repeated(is_finest) else run(*inputs)

    def _is_repeated(self, is_finest: bool) -> bool:
        """Whether a level is recomputed as a whole."""
        return self.recompute == "stages" or (self.recompute == "finest" and is_finest)

    def _is_plain(self, is_finest: bool) -> bool:
        """Whether a compiler runs a level as it is: it would keep what leads from a checkpoint within to another."""
        return self._is_repeated(is_finest) and torch.compiler.is_compiling()

    def _down(self, blocks: Sequence[nn.Module], is_finest: bool, x: Tensor) -> Tensor:
        """Blocks of a stage of the encoder."""
        if not self._is_plain(is_finest):
            return through(blocks, Pending((x,))).kept()
        for block in blocks:
            x = block(x)
        return x

    def _up(
        self, up: nn.Module, stage: nn.Module, head: Any, deep_supervision: bool, is_last: bool, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """A level of the decoder: its feature map, where another level follows, and its logits, where wanted."""
        if self._is_plain(is_last):
            features = stage(torch.cat((up(inputs[0]), *inputs[1:]), dim=1))
            return (head(features),) if is_last else (features, head(features)) if deep_supervision else (features,)
        x = through(blocks_of(stage), joined(up, *inputs))
        if is_last:
            return (x.then(head).kept(),)
        features = x.kept()
        return (features, head(features)) if deep_supervision else (features,)

    def _grouped(self, encoder: Any, x: Tensor) -> Groups:
        if not self.apart:
            return [x]
        per_sample = next(encoder.parameters()).shape[0] * x[0, 0].numel()
        size = group_size(len(x), per_sample, GROUP_ELEMENTS)
        return _split(x, [min(size, len(x) - start) for start in range(0, len(x), size)])


def _split(x: Tensor, sizes: Sequence[int]) -> Groups:
    """Groups of samples of these sizes."""
    if len(sizes) == 1:
        return [x]
    # Not `torch.split`, between checkpoints no compiler can place it.
    return [x.narrow(0, sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _joined_if_small(groups: Groups) -> Groups:
    """Join what is small enough to be run at once."""
    return groups if sum(x.numel() for x in groups) > GROUP_ELEMENTS else [_whole(groups)]


def _whole(groups: Groups) -> Tensor:
    return groups[0] if len(groups) == 1 else torch.cat(groups)
