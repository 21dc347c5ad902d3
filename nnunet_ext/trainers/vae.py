"""What trainers of networks with a VAE branch share: its loss in addition to the segmentation's, logged apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn

from nnunet_ext.architectures.reversible.vae_branch import KLPer, Reconstruction

if TYPE_CHECKING:
    from nnunet_ext.protocols import HostTrainer
else:
    HostTrainer = object


class VAELoss(nn.Module):
    """``L = L_segmentation + w_L2 * L2 + w_KL * KL`` (Yamazaki et al. 2021), L2 a mean; see `Reconstruction.losses`.

    Where the network gives no reconstruction, as in validation, only the segmentation's loss.

    Args:
        segmentation: Loss of nnU-Net.
        l2_weight, kl_weight: Weights of the two terms.
        kl_per: What the KL divergence is divided by.

    Raises:
        ValueError: `kl_per` is neither.
    """

    def __init__(self, segmentation: nn.Module, l2_weight: float, kl_weight: float, kl_per: KLPer = "voxel") -> None:
        super().__init__()
        if kl_per not in get_args(KLPer):
            raise ValueError(f'kl_per must be "voxel" or "latent", got {kl_per!r}: set one of them in the trainer.')
        self.segmentation = segmentation
        self.l2_weight, self.kl_weight, self.kl_per = l2_weight, kl_weight, kl_per
        self.sums: list[Tensor] = []  # of the epoch: segmentation, L2, KL, steps

    def forward(self, output: Any, target: Any) -> Tensor:
        """Loss of the network's output."""
        if not (isinstance(output, tuple) and isinstance(output[1], Reconstruction)):
            loss: Tensor = self.segmentation(output, target)
            return loss
        segmentation = self.segmentation(output[0], target)
        l2, kl = output[1].losses(self.kl_per)
        terms = [term.detach() for term in (segmentation, l2, kl, torch.ones_like(l2))]
        is_finite = torch.stack([term.float() for term in terms]).isfinite().all()  # else the step is left out
        terms = [torch.where(is_finite, term, 0) for term in terms]
        self.sums = [a + b for a, b in zip(self.sums, terms, strict=True)] if self.sums else terms
        total: Tensor = segmentation + self.l2_weight * l2 + self.kl_weight * kl
        return total

    def epoch_means(self) -> tuple[float, float, float] | None:
        """Means of segmentation loss, L2 and KL since the last call; None where there was no step."""
        if not self.sums:
            return None
        *sums, steps = (float(value) for value in self.sums)
        self.sums = []
        if not steps:
            return None
        segmentation, l2, kl = (value / steps for value in sums)
        return segmentation, l2, kl


class VAETrainerMixin(HostTrainer):
    """Loss of the VAE branch for trainers; place it before nnUNetTrainer.

    Attributes:
        l2_weight: Weight of the mean squared error of the reconstructed image (normalised intensities).
        kl_weight: Weight of the KL divergence of the latent.
        kl_per: ``"voxel"``: the divergence is divided by the voxels of the patch, as in the paper. ``"latent"``: by the
            numbers of the latent, which makes it 102 times larger at 64^3 and 819 times at 128^3.
    """

    l2_weight = 0.1
    kl_weight = 0.1
    kl_per: KLPer = "voxel"

    def _build_loss(self) -> nn.Module:
        return VAELoss(super()._build_loss(), self.l2_weight, self.kl_weight, self.kl_per)

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log the terms of the loss apart."""
        super().on_train_epoch_end(train_outputs)
        means = self.loss.epoch_means()
        if means is not None:
            segmentation, l2, kl = means
            self.print_to_log_file(
                f"segmentation loss {segmentation:.4f}, L2 of the reconstruction {l2:.4f}, "
                f"KL per {self.kl_per} {kl:.3g}"
            )


def image_channels(configuration_manager: ConfigurationManager) -> int:
    """Channels of the image, without those of a cascade's previous stage."""
    return len(configuration_manager.normalization_schemes)
