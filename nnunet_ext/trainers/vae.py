"""What trainers of networks with a VAE branch share: its loss in addition to the segmentation's, logged apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn

from nnunet_ext.architectures.reversible.vae_branch import Reconstruction

if TYPE_CHECKING:
    from nnunet_ext.protocols import HostTrainer
else:
    HostTrainer = object


class VAELoss(nn.Module):
    """``L = L_segmentation + w_L2 * L2 + w_KL * KL`` (Yamazaki et al. 2021), L2 and KL as means.

    Where the network gives no reconstruction, as in validation, only the segmentation's loss.

    Args:
        segmentation: Loss of nnU-Net.
        l2_weight, kl_weight: Weights of the two terms.
    """

    def __init__(self, segmentation: nn.Module, l2_weight: float, kl_weight: float) -> None:
        super().__init__()
        self.segmentation = segmentation
        self.l2_weight, self.kl_weight = l2_weight, kl_weight
        self.sums: list[Tensor] = []  # of the epoch: segmentation, L2, KL, steps

    def forward(self, output: Any, target: Any) -> Tensor:
        """Loss of the network's output."""
        if not (isinstance(output, tuple) and isinstance(output[1], Reconstruction)):
            loss: Tensor = self.segmentation(output, target)
            return loss
        segmentation = self.segmentation(output[0], target)
        l2, kl = output[1].losses()
        terms = [term.detach() for term in (segmentation, l2, kl, torch.ones_like(l2))]
        self.sums = [a + b for a, b in zip(self.sums, terms, strict=True)] if self.sums else terms
        total: Tensor = segmentation + self.l2_weight * l2 + self.kl_weight * kl
        return total

    def epoch_means(self) -> tuple[float, float, float] | None:
        """Means of segmentation loss, L2 and KL since the last call; None where there was no step."""
        if not self.sums:
            return None
        *sums, steps = (float(value) for value in self.sums)
        self.sums = []
        segmentation, l2, kl = (value / steps for value in sums)
        return segmentation, l2, kl


class VAETrainerMixin(HostTrainer):
    """Loss of the VAE branch for trainers; place it before nnUNetTrainer.

    Attributes:
        l2_weight: Weight of the mean squared error of the reconstructed image (normalised intensities).
        kl_weight: Weight of the mean KL divergence of the latent.
    """

    l2_weight = 0.1
    kl_weight = 0.1

    def _build_loss(self) -> nn.Module:
        return VAELoss(super()._build_loss(), self.l2_weight, self.kl_weight)

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log the terms of the loss apart."""
        super().on_train_epoch_end(train_outputs)
        means = self.loss.epoch_means()
        if means is not None:
            segmentation, l2, kl = means
            self.print_to_log_file(
                f"segmentation loss {segmentation:.4f}, L2 of the reconstruction {l2:.4f}, KL {kl:.4f}"
            )


def image_channels(configuration_manager: ConfigurationManager) -> int:
    """Channels of the image, without those of a cascade's previous stage."""
    return len(configuration_manager.normalization_schemes)
