"""FasterFusion U-Net: nnU-Net's networks, their heavy convolutions replaced by blocks that fuse for prediction.

Heinrich, Hagenah 2023, "Make nnUNets Small Again" (MIDL short paper). Different from the paper: see
`nnunet_ext.architectures.fusion.blocks`; batch norm everywhere and thresholds below 160 are options, without
which the network becomes smaller, but hardly faster (docs/methods/faster_fusion.md).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from dynamic_network_architectures.building_blocks.helper import get_matching_batchnorm
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nnunet_ext.architectures.common.copying import convert_in_place, copied
from nnunet_ext.architectures.common.host_unet import host_unet, initialize_as_host
from nnunet_ext.architectures.common.norm_statistics import NormStatistics
from nnunet_ext.architectures.common.onednn import is_exporting, is_observed, is_transformed
from nnunet_ext.architectures.common.plan_arguments import PlanArguments
from nnunet_ext.architectures.common.plan_sizes import check_patch_size, patch_divisors
from nnunet_ext.architectures.common.plan_values import options_checked
from nnunet_ext.architectures.fusion.blocks import Downsample, FasterFusionBlock, Form, FusedBlock, Geometry
from nnunet_ext.architectures.fusion.folding import fold_batch_norms
from nnunet_ext.architectures.fusion.snapshot import Snapshot

if TYPE_CHECKING:
    from typing_extensions import Self

_logger = logging.getLogger("nnunet_ext")
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class FasterFusionUNet(nn.Module):
    """FasterFusion U-Net (Heinrich, Hagenah 2023): fewer parameters and operations, fused for prediction.

    nnU-Net's `PlainConvUNet` or `ResidualEncoderUNet`, with FasterFusion blocks in place of convolutions of at least
    `threshold` output channels. Stem, transposed and 1x1x1 convolutions and heads stay. Arguments that are not listed
    mean what they mean in nnU-Net's plans.

    In evaluation without gradients the network computes in its fused form by itself, always that of its present weights
    and settings; weights and state_dict stay those of training. docs/methods/faster_fusion.md says where it does not.

    Args:
        input_channels: Channels of the image.
        num_classes: Channels of the logits.
        deep_supervision: Return a list of logits, largest first.
        threshold: Output channels from which on a convolution is replaced.
        divisor: One of so many input channels meets the kernel; one number, or one per resolution, finest first.
        downsample: "stride", or "maxpool" after the block, as in the paper.
        batch_norm: Batch norm in place of the plans' norm also outside the blocks, so that prediction needs no norm.
        decoder_split: Source of the channels that meet the kernel in the first block of a decoder stage: "up",
            what is upsampled, as in the paper, or "both", half of them from the skip.
        form: Build the fused network itself, as `fuse` returns it: "hybrid", "t" or "dense".

    Shape: (B, input_channels, *patch) -> (B, num_classes, *patch), or a list of (B, num_classes, *patch / scale);
        patch divisible by the cumulative strides.

    Raises:
        ValueError: both or neither of n_conv_per_stage and n_blocks_per_stage, lists that do not fit n_stages, fewer
            than two stages, even kernels, a depth below 1, an unknown option; in forward, another patch.
    """

    @options_checked
    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        deep_supervision: bool = False,
        threshold: int = 160,
        divisor: int | Sequence[int] = 4,
        downsample: Downsample = "stride",
        batch_norm: bool = False,
        decoder_split: Literal["up", "both"] = "up",
        form: Form | None = None,
        **plan_arguments: Any,
    ) -> None:
        super().__init__()
        if decoder_split not in ("up", "both"):
            raise ValueError(f'decoder_split must be "up" or "both", got {decoder_split!r}.')
        plan = PlanArguments.of(plan_arguments)
        if batch_norm:
            kept = {k: v for k, v in plan.norm_op_kwargs.items() if k in ("eps", "momentum")}
            plan = replace(plan, norm_op=get_matching_batchnorm(dimension=plan.dim), norm_op_kwargs=kept)
        host = host_unet(plan, input_channels, num_classes, deep_supervision)
        self.encoder, self.decoder = host.encoder, host.decoder
        self.patch_divisors = patch_divisors(self.encoder.strides)
        divisors = [divisor] * plan.n_stages if isinstance(divisor, int) else list(divisor)
        if len(divisors) != plan.n_stages:
            raise ValueError(f"divisor needs one number or {plan.n_stages} of them (n_stages), got {divisors}.")
        self._replace(threshold, divisors, downsample, decoder_split == "both", plan.norm_op_kwargs)
        self.batch_norm = batch_norm
        self.form: Form | None = None
        self._fused: _Fused | None = None
        self._weights_in_channels_last = False
        if form is not None:
            self._fuse_in_place(form)
        self.norm_statistics = NormStatistics.of(self)

    def _replace(
        self,
        threshold: int,
        divisors: Sequence[int],
        downsample: Downsample,
        both: bool,
        norm_op_kwargs: Mapping[str, Any] | None,
    ) -> None:
        """Put blocks in the place of heavy convolutions."""
        stem = next(module for module in self.encoder.modules() if isinstance(module, ConvDropoutNormReLU))
        stages = [*self.encoder.stages, *self.decoder.stages[::-1]]
        firsts = [stage.convs[0] for stage in self.decoder.stages] if both else []
        for stage, divisor in zip(stages, [*divisors, *divisors[:-1]], strict=True):
            for parent, name, old in _convolutions(stage):
                inputs = 2 if old in firsts else 1
                replaceable = old is not stem and max(old.conv.kernel_size) > 1
                wide = old.output_channels >= threshold and old.input_channels >= inputs * divisor
                if not (replaceable and wide):
                    continue
                geometry = Geometry(
                    conv_op=type(old.conv),
                    input_channels=old.input_channels,
                    output_channels=old.output_channels,
                    kernel_size=old.conv.kernel_size,
                    stride=old.conv.stride,
                    divisor=divisor,
                    inputs=inputs,
                    downsample=downsample,
                )
                block = FasterFusionBlock(
                    geometry,
                    conv_bias=old.conv.bias is not None,
                    norm_op_kwargs=norm_op_kwargs,
                    dropout=getattr(old, "dropout", None),
                    nonlin=getattr(old, "nonlin", None),
                )
                setattr(parent, name, block)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits; in training with deep supervision a list, largest first."""
        check_patch_size(x, self.patch_divisors, self.norm_statistics, self.training)
        network = self._fused_twin() if self.form is None and self._predicts_fused(x) else self
        return network._logits(x)

    def _logits(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.form is None or not self._in_channels_last(x):
            return self.decoder(self.encoder(x))
        outputs = self.decoder(self.encoder(x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])))
        return [o.contiguous() for o in outputs] if isinstance(outputs, list) else outputs.contiguous()

    def _predicts_fused(self, x: Tensor) -> bool:
        """Whether this call computes in the fused form; where it could be expected and can't, the log says why."""
        if self.training or torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling():
            _log_while_compiling()
            return False
        if is_exporting() or is_transformed() or _is_placeholder(x):
            return False
        hindrance = self._hindrance()
        _log_form(hindrance)
        return hindrance is None

    def _hindrance(self) -> str | None:
        """What the fused form would not do as this network does it."""
        parts = [module for module in self.modules() if module is not self]
        if any(parametrize.is_parametrized(module) for module in parts):
            return "weights are parametrised"
        if any(module.training for module in parts):
            return "a part of it is in training mode, call eval() of the whole"
        if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in parts):
            return "hooks look into it"
        if not all(module.can_fuse for module in parts if isinstance(module, FasterFusionBlock)):
            return "parts of a block were replaced or changed"
        return None

    def _fused_twin(self) -> FasterFusionUNet:
        """Return the fused network; make it again when anything has changed that it was made of."""
        if self._fused is None or not self._fused.made_of.fits(self):
            # nnU-Net's move to the device makes inference tensors of the weights; copies need not be any.
            with torch.inference_mode(False):
                self._fused = _Fused(self.fuse(), Snapshot.of(self))
        return self._fused.network

    def _in_channels_last(self, x: Tensor) -> bool:
        """Whether to compute in channels_last, which takes that no norm is left.

        On the CPU (benchmarks/faster_fusion.py), and on CUDA in half precision, whose kernels have this layout.
        """
        if not self.batch_norm or x.dim() not in _CHANNELS_LAST or is_observed():
            return False
        if x.device.type != "cpu" and not _is_half_on_cuda(x):
            return False
        if not self._weights_in_channels_last:  # an image of one channel alone does not tell its layout
            convert_in_place(self, memory_format=_CHANNELS_LAST[x.dim()])
            self._weights_in_channels_last = True
        return True

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation."""
        self._fused = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:  # a move would leave the fused form where it is
        self._fused = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_fused": None}

    def fuse(self, form: Form = "hybrid") -> FasterFusionUNet:
        """Return the network that predicts: blocks fused, batch norms folded, in evaluation; this one stays as it is.

        Args:
            form: "hybrid", or for comparison and other programs the paper's "t" or "dense".

        Raises:
            ValueError: another form, or this network is fused already.
        """
        if self.form is not None:
            raise ValueError(f"This network is fused already (form={self.form!r}): fuse the one that was trained.")
        fused = copied(self).eval()
        fused._fuse_in_place(form)
        return fused

    def _fuse_in_place(self, form: Form) -> None:
        for parent in list(self.modules()):
            for name, child in parent.named_children():
                if isinstance(child, FasterFusionBlock):
                    setattr(parent, name, child.fuse(form))
        fold_batch_norms(self)
        self.form = form

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initialise a module as nnU-Net's own networks do (He et al. 2015); meant for `Module.apply`.

        Activations keep their size through blocks (tests/architectures/fusion/test_blocks.py). Residual blocks start as
        identity, by the norm inside their last block.
        """
        initialize_as_host(module)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that training keeps per sample, in the unit of nnU-Net's PlainConvUNet.

        Args:
            input_size: Voxels per axis.
        """
        total = int(
            self.encoder.compute_conv_feature_map_size(input_size)
            + self.decoder.compute_conv_feature_map_size(input_size)
        )
        # nnU-Net's residual blocks count for themselves, as if all their convolutions were plain.
        size = list(input_size)
        for stage, stride in zip(self.encoder.stages, self.encoder.strides, strict=True):
            size = [n // s for n, s in zip(size, stride, strict=True)]
            for block in stage.modules():
                if isinstance(block, (BasicBlockD, BottleneckD)):
                    total += sum(_surplus(child, size) for child in block.children())
        return total


@dataclass(frozen=True)
class _Fused:
    """A fused network and what it was made of; no module, so that the state_dict does not hold it."""

    network: FasterFusionUNet
    made_of: Snapshot


@cache
def _log_form(hindrance: str | None) -> None:
    """Say it once, not for every patch."""
    if hindrance is None:
        _logger.warning("nnunet_ext: FasterFusionUNet predicts in its fused form.")
    else:
        _logger.warning(
            "nnunet_ext: FasterFusionUNet predicts in its form of training, which is slower: %s.", hindrance
        )


@torch.compiler.assume_constant_result  # said when the graph is made, and no part of it
def _log_while_compiling() -> None:
    _log_form("torch.compile is on, set nnUNet_compile=f for the fused form")


def _is_placeholder(x: Tensor) -> bool:
    """Whether weights are placeholders or read again later: meta tensors, CUDA graphs."""
    return x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_half_on_cuda(x: Tensor) -> bool:
    if x.device.type != "cuda":
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype in (torch.float16, torch.bfloat16)


def _convolutions(module: nn.Module) -> Iterator[tuple[nn.Module, str, ConvDropoutNormReLU]]:
    """Blocks of nnU-Net's convolution, norm and nonlinearity: parent, name, block."""
    for name, child in module.named_children():
        if isinstance(child, ConvDropoutNormReLU):
            yield module, name, child
        else:
            yield from _convolutions(child)


def _surplus(block: nn.Module, output_size: Sequence[int]) -> int:
    """Elements that a block keeps beyond a plain convolution; output_size in voxels per axis."""
    if not isinstance(block, (FasterFusionBlock, FusedBlock)):
        return 0
    geometry = block.geometry
    input_size = [n * s for n, s in zip(output_size, geometry.stride, strict=True)]
    return block.compute_conv_feature_map_size(input_size) - geometry.output_channels * prod(output_size)
