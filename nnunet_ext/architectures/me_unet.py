"""Dual meU-net: two U-Nets of different context, averaged; stage 1 of meU-net's cascade.

Wang, Blackie, Miguel-Aliaga, Bai 2022, "Memory-efficient Segmentation of High-resolution Volumetric MicroCT Images"
(MIDL). The paper does not say how the branches join: the mean is ours. Different from the paper: the branches are
nnU-Net's own networks, plain or ResEnc, trained one after the other within a step (`nnunet_ext.trainers.me_cascade`),
so that only one keeps its feature maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from math import log
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_ext.architectures.checkpointed.levels import Recompute
from nnunet_ext.architectures.checkpointed.unet import networks
from nnunet_ext.architectures.common.host_unet import host_unet, initialize_as_host
from nnunet_ext.architectures.common.norm_statistics import NormStatistics
from nnunet_ext.architectures.common.plan_arguments import PlanArguments
from nnunet_ext.architectures.common.plan_sizes import check_patch_size, patch_divisors
from nnunet_ext.architectures.common.plan_values import options_checked

BRANCHES = 2
_STATE = "mean.seg_layers._extra_state"


class DualMeUNet(nn.Module):
    """Dual meU-net (Wang et al. 2022): two U-Nets of different context, their probabilities averaged, which is ours.

    The logits say what the mean of the branches' probabilities says:

        labels:   z = log(mean_i softmax(z_i))
        regions:  z = logit(mean_i sigmoid(z_i))

    so that softmax or sigmoid of z, nnU-Net's loss and its argmax are those of the mean. Arguments that are not listed
    mean what they mean in nnU-Net's plans.

    Args:
        input_channels: Channels of the image.
        num_classes: Channels of the logits.
        deep_supervision: Return a list of logits, largest first.
        regions: Whether the classes are nnU-Net's regions, each with a sigmoid of its own. Part of the state_dict, so
            that a network built from plans alone learns it from the checkpoint.
        recompute: "stages", "norms" or "finest": train the branches with activation checkpointing; None: without.

    Shape: (B, input_channels, *patch) -> (B, num_classes, *patch), or a list of (B, num_classes, *patch / scale);
        patch divisible by the cumulative strides.

    Raises:
        ValueError: both or neither of n_conv_per_stage and n_blocks_per_stage, lists that do not fit n_stages, fewer
            than two stages, even kernels, a depth below 1; in forward, another patch.
    """

    @options_checked
    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        deep_supervision: bool = False,
        regions: bool = False,
        recompute: Recompute | None = None,
        **plan_arguments: Any,
    ) -> None:
        super().__init__()
        plan = PlanArguments.of(plan_arguments)
        self.branches = nn.ModuleList(
            host_unet(plan, input_channels, num_classes, deep_supervision, networks(recompute)) for _ in range(BRANCHES)
        )
        first: Any = self.branches[0]
        self.patch_divisors = patch_divisors(first.encoder.strides)
        self.norm_statistics = NormStatistics.of(self)
        # What has this name nnU-Net's `-pretrained_weights` neither asks for nor takes.
        self.mean = nn.ModuleDict({"seg_layers": Mean(regions)})

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits; in training with deep supervision a list, largest first."""
        check_patch_size(x, self.patch_divisors, self.norm_statistics, self.training)
        outputs = [branch(x) for branch in self.branches]
        mean = self.mean["seg_layers"]
        if isinstance(outputs[0], Tensor):
            return mean(outputs)
        return [mean(level) for level in zip(*outputs, strict=True)]

    def weights_from_host(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State_dict whose branches both hold these weights of nnU-Net's own network, to start a training from.

        Args:
            weights: State_dict of a network from the same plans.
        """
        branches = {f"branches.{i}.{key}": value for i in range(BRANCHES) for key, value in weights.items()}
        return {_STATE: torch.tensor(self.regions), **branches}

    @property
    def regions(self) -> bool:
        """Whether the classes are regions."""
        return cast(Mean, self.mean["seg_layers"]).regions

    @regions.setter
    def regions(self, regions: bool) -> None:
        cast(Mean, self.mean["seg_layers"]).regions = regions

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state = state_dict.pop(f"{prefix}_extra_state", None)  # the key of earlier checkpoints
        if state is not None:
            state_dict[prefix + _STATE] = state
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def decoder(self) -> Decoders:
        """The decoders of the branches, for nnU-Net's switch of deep supervision."""
        return Decoders([branch.decoder for branch in self.branches])

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initialise a module as nnU-Net's own networks do; meant for `Module.apply`."""
        initialize_as_host(module)

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that training keeps per sample, in nnU-Net's unit: those of one branch, they train in turn.

        Args:
            input_size: Voxels per axis.
        """
        first: Any = self.branches[0]
        return int(first.compute_conv_feature_map_size(input_size))


class Mean(nn.Module):
    """The mean of several branches, which remembers in the checkpoint how their logits are meant.

    Args:
        regions: Sigmoids, not softmax.

    Shape: several (B, C, *spatial) -> (B, C, *spatial).
    """

    def __init__(self, regions: bool) -> None:
        super().__init__()
        self.regions = regions

    def forward(self, logits: Sequence[Tensor]) -> Tensor:
        """Return logits of the mean."""
        return mean_of_sigmoids(logits) if self.regions else mean_of_softmaxes(logits)

    def get_extra_state(self) -> Tensor:
        """Make `regions` part of the state dict."""
        return torch.tensor(self.regions)

    def set_extra_state(self, state: Tensor) -> None:
        """Take `regions` from a state dict."""
        self.regions = bool(state)


class Decoders:
    """Several decoders with one switch of deep supervision.

    Args:
        decoders: Decoders of the branches.
    """

    def __init__(self, decoders: Sequence[Any]) -> None:
        self._decoders = decoders

    @property
    def deep_supervision(self) -> bool:
        """Whether they return a list of logits."""
        return bool(self._decoders[0].deep_supervision)

    @deep_supervision.setter
    def deep_supervision(self, enabled: bool) -> None:
        for decoder in self._decoders:
            decoder.deep_supervision = enabled


def mean_of_softmaxes(logits: Sequence[Tensor]) -> Tensor:
    """Logarithm of the mean of softmaxes over channels.

    Shape: several (B, C, *spatial) -> (B, C, *spatial).
    """
    logs = [functional.log_softmax(_precise(z), dim=1) for z in logits]
    return (reduce(torch.logaddexp, logs) - log(len(logs))).to(logits[0].dtype)


def mean_of_sigmoids(logits: Sequence[Tensor]) -> Tensor:
    """Logit of the mean of sigmoids.

    Shape: several (B, C, *spatial) -> (B, C, *spatial).
    """
    inside = reduce(torch.logaddexp, [functional.logsigmoid(_precise(z)) for z in logits])
    outside = reduce(torch.logaddexp, [functional.logsigmoid(-_precise(z)) for z in logits])
    return (inside - outside).to(logits[0].dtype)  # the number of branches cancels out


def _precise(z: Tensor) -> Tensor:
    """In float32 at least."""
    return z.to(torch.promote_types(z.dtype, torch.float32))
