"""The expanded pass of meU-net: levels 2 and coarser learn from a large patch, the finest level only feeds them.

Wang, Blackie, Miguel-Aliaga, Bai 2022, "Memory-efficient Segmentation of High-resolution Volumetric MicroCT Images"
(MIDL). Different from the paper: no network of its own. The pass borrows the modules of any U-Net with an encoder and a
decoder that hold `stages`, and a decoder with `seg_layers`: nnU-Net's own, plain or ResEnc, and `ReversibleUNet`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from torch import Tensor, nn

from nnunet_ext.architectures.reversible.stages import GROUP_ELEMENTS


class ExpandedPass(nn.Module):
    """Logits of the second level of a U-Net on a large patch, without gradient for the finest level.

    The finest level of the encoder and the first block of the second, which holds the strided convolution, run in
    evaluation mode and without gradient, some samples at a time: their feature maps, the largest of all, are never
    kept. All coarser levels of encoder and decoder run as they do in the network. Weights are the network's own.

    Args:
        network: A U-Net of at least three stages.
        deep_supervision: Return the logits of all levels from the second on, largest first.

    Shape: (B, C_in, *patch) -> (B, num_classes, *patch / stride of level 2), or a list of them.

    Raises:
        ValueError: the network is not built of such an encoder and decoder.
    """

    def __init__(self, network: nn.Module, deep_supervision: bool = False) -> None:
        super().__init__()
        _check(network)
        self.shallow, encoder = _split(network.encoder)
        decoder = _replaced(network.decoder, **_without_finest(network.decoder))
        decoder.deep_supervision = deep_supervision
        # Its forward is the network's own, so that what recomputes feature maps does so here too.
        self.deep = _replaced(network, encoder=encoder, decoder=decoder)
        self._levels: tuple[Any, Any] = (self.shallow, self.deep)  # what is called; a tuple is not in state_dict

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits."""
        shallow, deep = self._levels
        with torch.no_grad(), evaluating(self.shallow):
            channels = next(self.shallow.parameters()).shape[0]
            size = max(1, GROUP_ELEMENTS // max(1, channels * x[0, 0].numel()))
            below = torch.cat([shallow(samples) for samples in x.split(size)])
        logits: Tensor | list[Tensor] = deep(below)
        return logits

    def compile_levels(self, **options: Any) -> None:
        """Compile both parts, as nnU-Net compiles its network; modes are switched outside of them.

        Args:
            options: Options of `torch.compile`.
        """
        # Not `Module.compile`, which leaves a bare Sequential as it is up to PyTorch 2.11, without a word.
        self._levels = torch.compile(self.shallow, **options), torch.compile(self.deep, **options)


def centre_crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The centre of a patch.

    Shape: (B, C, *patch) -> (B, C, *size).
    """
    for axis, wanted in enumerate(size, start=2):
        x = x.narrow(axis, (x.shape[axis] - wanted) // 2, wanted)
    return x.contiguous()


def downsample_labels(labels: Tensor, strides: Sequence[int]) -> Tensor:
    """Labels at a coarser level, as nnU-Net's deep supervision takes them: the nearest voxel to each centre.

    Shape: (B, C, *patch) -> (B, C, *patch / strides), patch divisible by the strides.
    """
    nearest = [slice(stride // 2, None, stride) for stride in strides]
    return labels[tuple([slice(None)] * 2 + nearest)].contiguous()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run `module` in evaluation mode and give every part its own mode back: statistics are not counted."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _check(network: nn.Module) -> None:
    encoder, decoder = getattr(network, "encoder", None), getattr(network, "decoder", None)
    stages, heads = getattr(encoder, "stages", None), getattr(decoder, "seg_layers", None)
    if stages is None or heads is None or not hasattr(decoder, "stages"):
        raise ValueError(
            f"meU-net trains U-Nets with encoder.stages, decoder.stages and decoder.seg_layers, got "
            f"{type(network).__name__}: use nnU-Net's own networks or ReversibleUNet."
        )
    if len(heads) < 2:
        raise ValueError(
            f"meU-net trains the head of the second level, so it needs a network of at least 3 stages, got "
            f"{len(stages)}: plan a larger patch, or use the default trainer."
        )


def _replaced(module: Any, **children: nn.Module | None) -> Any:
    """A module with the same attributes and other children; what is not replaced is shared."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


def _without_finest(decoder: Any) -> dict[str, nn.Module]:
    """Children of a decoder that hold one module per level, without that of the finest, the last."""
    n = len(decoder.stages)
    per_level = {k: v for k, v in decoder.named_children() if isinstance(v, nn.ModuleList) and len(v) == n}
    return {name: modules[:-1] for name, modules in per_level.items()}


def _split(encoder: Any) -> tuple[nn.Module, nn.Module]:
    """What runs without gradient, up to the first block of the second level; an encoder of the rest."""
    transitions = getattr(encoder, "transitions", None)
    first, second, *coarser = encoder.stages
    if transitions is None:
        stem = getattr(encoder, "stem", None)
        blocks = _blocks(second)
        shallow = nn.Sequential(*_layers(nn.Sequential(*([] if stem is None else [stem]), first, blocks[:1])))
        children: dict[str, nn.Module | None] = {"stages": nn.Sequential(blocks[1:], *coarser)}
        return shallow, _replaced(encoder, **children, **({} if stem is None else {"stem": None}))
    if len(transitions) != len(encoder.stages):
        raise ValueError(
            f"meU-net needs one transition per stage of the encoder, got {len(transitions)} for {len(encoder.stages)} "
            f"stages of {type(encoder).__name__}: use nnU-Net's own networks or ReversibleUNet."
        )
    shallow = nn.Sequential(transitions[0], first, transitions[1])
    rest = {
        "transitions": nn.ModuleList([nn.Identity(), *transitions[2:]]),
        "stages": nn.ModuleList([second, *coarser]),
    }
    return shallow, _replaced(encoder, **rest)


def _layers(module: Any) -> list[nn.Module]:
    """Layers of nnU-Net's plain blocks: while the last of a block runs, nobody holds the input of the first."""
    inside = {nn.Sequential: None, StackedConvBlocks: "convs", ConvDropoutNormReLU: "all_modules"}
    if type(module) not in inside or module._forward_hooks or module._forward_pre_hooks:
        return [module]
    name = inside[type(module)]
    return [layer for part in (getattr(module, name) if name else module) for layer in _layers(part)]


def _blocks(stage: Any) -> nn.Sequential:
    """Blocks of an nnU-Net stage, plain or residual."""
    while isinstance(stage, nn.Sequential) and len(stage) == 1:
        stage = stage[0]
    for name in ("convs", "blocks"):
        if isinstance(getattr(stage, name, None), nn.Sequential):
            return getattr(stage, name)
    raise ValueError(
        f"meU-net can't find the blocks of a stage of type {type(stage).__name__}: use nnU-Net's own networks or "
        "ReversibleUNet."
    )
