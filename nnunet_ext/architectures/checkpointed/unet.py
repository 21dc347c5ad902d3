"""nnU-Net's own networks, trained with activation checkpointing.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174. Different from the
paper: the stages of a U-Net are its segments, and large ones run in groups of samples.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor

from nnunet_ext.architectures.checkpointed.levels import Recomputation, Recompute
from nnunet_ext.architectures.common.host_unet import HOST_NETWORKS, Networks
from nnunet_ext.architectures.common.plan_sizes import check_stages


class _Checkpointed:
    """Recomputes the stages of nnU-Net's networks in training; place it before one of them.

    Everything else is the network's own: parameters and their names, initialisation, outputs. Evaluation, passes
    without gradients, export, tracing and `torch.func` run the network's own forward pass. Gradients equal those of the
    network bit for bit where samples are not apart, else up to rounding.

    Args:
        recompute: "stages": of each level training keeps what leads to others. "norms": it keeps the outputs of
            convolutions too, so that none runs twice but those that cost nothing, as the first on one channel.
            "finest": as "stages" the finest level of the decoder and the two finest of the encoder, as "norms" others.
        samples_apart: Run large feature maps in groups of samples; None: where the norm treats samples apart.

    Raises:
        ValueError: fewer than two stages, another word, samples apart with a norm over the batch.
    """

    def __init__(
        self, *args: Any, recompute: Recompute = "stages", samples_apart: bool | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        host: Any = self
        check_stages("checkpointed U-Net", len(host.encoder.stages))
        self.recomputation = Recomputation.of(host.encoder, recompute, samples_apart)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits; with deep supervision a list, largest first."""
        host: Any = self
        if not self.recomputation.applies_to(host):
            return super().forward(x)  # type: ignore[misc]
        return self.recomputation.decode(host.decoder, self.recomputation.encode(host.encoder, x))


class CheckpointedPlainConvUNet(_Checkpointed, PlainConvUNet):
    """`PlainConvUNet` with activation checkpointing."""


class CheckpointedResidualEncoderUNet(_Checkpointed, ResidualEncoderUNet):
    """`ResidualEncoderUNet` with activation checkpointing."""


def networks(recompute: Recompute | None) -> Networks:
    """What builds networks of default and of ResEnc plans; None: nnU-Net's own."""
    if recompute is None:
        return HOST_NETWORKS
    checkpointed = (CheckpointedPlainConvUNet, CheckpointedResidualEncoderUNet)
    return partial(checkpointed[0], recompute=recompute), partial(checkpointed[1], recompute=recompute)
