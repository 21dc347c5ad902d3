"""Variational branch that reconstructs the image from the bottleneck, in training only.

Myronenko 2018, https://arxiv.org/abs/1810.11654, as used by Yamazaki et al. 2021, https://arxiv.org/abs/2103.09042.
Different from the papers: a spatial latent from 1x1 convolutions instead of a dense one, so that any patch size works,
and blocks that are recomputed in the backward pass, so that the branch keeps next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from nnunet_ext.architectures.common.copying import copied
from nnunet_ext.architectures.common.norm_statistics import NormStatistics
from nnunet_ext.architectures.common.plan_sizes import check_patch_size, patch_divisors
from nnunet_ext.architectures.reversible.network import ChainNetwork
from nnunet_ext.architectures.reversible.recomputation import run_recomputed, uncompiled
from nnunet_ext.architectures.reversible.stages import ReversiblePlan, StageSpec

KLPer = Literal["voxel", "latent"]

_FEWEST = 8  # channels of a block
_LIMIT = 10.0  # of the log variance, to both sides


class Reconstruction(NamedTuple):
    """What the branch makes of the bottleneck.

    Attributes:
        image: Reconstructed, (B, image_channels, *patch).
        target: The image itself.
        mean, log_variance: Mean and logarithm of the variance of the latent, (B, latent, *bottleneck).
    """

    image: Tensor
    target: Tensor
    mean: Tensor
    log_variance: Tensor

    def losses(self, kl_per: KLPer = "voxel") -> tuple[Tensor, Tensor]:
        """Mean squared error of the image, and the KL divergence of the latent from a standard normal.

        KL: ``1/N sum(mu^2 + sigma^2 - log sigma^2 - 1)`` over the latent of a sample, mean over samples.

        Args:
            kl_per: N: ``"voxel"``, the voxels of the image, as Yamazaki et al. have it (Eq. 5), or ``"latent"``, the
                numbers of the latent, of which there are far fewer.
        """
        mean, log_variance = self.mean.float(), self.log_variance.float()
        kl = (mean.square() + log_variance.exp() - log_variance - 1).mean()
        if kl_per == "voxel":
            kl = kl * (mean[0].numel() / self.image[0, 0].numel())
        return nn.functional.mse_loss(self.image.float(), self.target.float()), kl


class VAENetwork(ChainNetwork):
    """A network with an optional branch `vae`: weights of a training with the branch also load without it."""

    vae: VAEBranch | None
    image_channels: int
    norm_statistics: NormStatistics

    @uncompiled
    def forward(self, x: Tensor) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], Reconstruction]:
        """Return logits; in training with deep supervision a list, with the VAE branch also its reconstruction."""
        check_patch_size(
            x, patch_divisors([stage.stride for stage in self.stages]), self.norm_statistics, self.training
        )
        with_vae = self.vae is not None and self.training
        found = list(self.chain(with_vae)(x))
        logits = found[:0:-1] if with_vae else found[::-1]
        outputs = logits if self.decoder.deep_supervision else logits[0]
        if not with_vae:
            return outputs
        return outputs, self.vae(found[0], x[:, : self.image_channels])  # type: ignore[misc]

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """Initialise a module as nnU-Net's own networks do (He et al. 2015); meant for `Module.apply`."""
        InitWeights_He(1e-2)(module)
        if isinstance(module, VAEBranch):  # `apply` comes to it after its convolutions
            module.start_at_prior()

    def fuse(self) -> VAENetwork:
        """Return the network for prediction: a copy without the branch."""
        network = copied(self)
        network.vae = None
        return network

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = [key for key in state_dict if key.startswith(f"{prefix}vae.")]
        if self.vae is None:
            for key in own:
                del state_dict[key]
        elif not own:
            raise RuntimeError(
                f"{type(self).__name__} with vae=True needs the weights of its VAE branch, these have none: load them "
                "into the network without the branch (the trainer's NoVAE variant)."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def reconstructed_channels(asked: int | None, input_channels: int) -> int:
    """Channels of the image that are reconstructed, the first ones; None: all.

    Raises:
        ValueError: the image does not have so many, or there would be none.
    """
    if asked is None:
        return input_channels
    if not 1 <= asked <= input_channels:
        raise ValueError(
            f"image_channels are the first of input_channels and at least one, got {asked} of {input_channels}: leave "
            "it out to reconstruct all."
        )
    return asked


class VAEBranch(nn.Module):
    """Sample a latent of the bottleneck (its mean in evaluation) and decode the image from it.

    Each block: convolution, norm, nonlinearity, linear upsampling by the stride of its level; channels halve from an
    eighth of the bottleneck's down to 8.

    The latent starts as the prior, N(0, 1), and is computed in float32 under autocast too: the bottleneck of a chain of
    couplings is not normalised, and the gradient of ``exp(log_variance)`` soon leaves float16, first of all beneath a
    gradient scaler (tests/trainers/test_vae.py).

    Args:
        image_channels: Channels of the image to reconstruct.
        plan: Convolutions, norm and nonlinearity of the network.
        stages: Stages of the network, finest first.

    Shape: (B, C_bottleneck, *patch / strides), image (B, image_channels, *patch) -> `Reconstruction`.
    """

    def __init__(self, image_channels: int, plan: ReversiblePlan, stages: Sequence[StageSpec]) -> None:
        super().__init__()
        channels = stages[-1].channels
        latent = max(_FEWEST, channels // 8)
        ones = [1] * len(stages[0].kernel_size)
        self.mean = plan.conv(channels, latent, ones, ones)
        self.log_variance = plan.conv(channels, latent, ones, ones)
        self.recomputed = plan.samples_are_independent  # running statistics would be counted twice
        blocks = []
        mode = "trilinear" if len(ones) == 3 else "bilinear"
        for stage in reversed(stages):
            fewer = max(_FEWEST, latent // 2)
            blocks.append(
                nn.Sequential(
                    *plan.conv_norm_nonlin(latent, fewer, stage.kernel_size, ones),
                    nn.Upsample(scale_factor=tuple(map(float, stage.stride)), mode=mode),
                )
            )
            latent = fewer
        self.blocks = nn.ModuleList(blocks)
        self.image = plan.conv(latent, image_channels, stages[0].kernel_size, ones)
        self.start_at_prior()

    def start_at_prior(self) -> None:
        """Let the latent be N(0, 1) whatever the bottleneck is; its convolutions learn from the first step on."""
        for conv in (self.mean, self.log_variance):
            for parameter in conv.parameters():
                nn.init.zeros_(parameter)

    # PyTorch 2.5 refuses checkpoints in graphs that it cuts at the buckets of DDP (tests/contract/test_ddp.py).
    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def forward(self, features: Tensor, image: Tensor) -> Reconstruction:
        """Return the reconstruction of `image` from `features`."""
        mean, log_variance = self._latent(features)
        x = mean
        if self.training:
            x = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        *blocks, before, last = self.blocks
        for block in blocks:
            x = self._run(block, x)
        # In one piece, because its input has not the size of the image yet.
        x = self._run(nn.Sequential(before, last, self.image), x)
        return Reconstruction(x, image, mean, log_variance)

    def _latent(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance; beyond its limits the latter keeps its gradient, by which KL brings it back."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(next(self.mean.parameters()).dtype)
            mean, log_variance = self.mean(features), self.log_variance(features)
        limited = log_variance.clamp(-_LIMIT, _LIMIT)
        return mean, log_variance + (limited - log_variance).detach()

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        return run_recomputed(module, self.recomputed, x)
