"""Cross-entropy that weights rare classes up, for heavy class imbalance.

Wang, Blackie, Miguel-Aliaga, Bai 2022, "Memory-efficient Segmentation of High-resolution Volumetric MicroCT Images"
(MIDL), weight their cross-entropy by a softmax. The paper's formula was not at hand: that below is our reading.
"""

from __future__ import annotations

import torch
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class SoftmaxWeightedCrossEntropy(RobustCrossEntropyLoss):
    """Cross-entropy with class weights ``w_c = C softmax_c(-f_c)``, f_c: share of class c among the labels given.

    The weights' mean is 1. A class that is everywhere weighs e times less than one that is nowhere.

    Args:
        ignore_index: Label that counts neither in the shares nor in the loss.

    Shape: logits (B, C, *patch), labels (B, 1, *patch) or (B, *patch) -> scalar.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(ignore_index=ignore_index)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the weighted mean over the labels."""
        labels = (target[:, 0] if target.ndim == input.ndim else target).long()
        weight = class_weights(labels, input.shape[1], self.ignore_index)
        return F.cross_entropy(input, labels, weight.to(input.dtype), ignore_index=self.ignore_index)


def class_weights(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Weights (num_classes,) of the classes, float32; see `SoftmaxWeightedCrossEntropy`.

    Args:
        labels: Int64, of any shape.
        num_classes: Number of classes, C.
        ignore_index: Label that does not count.
    """
    counted = labels.masked_fill(labels == ignore_index, -1)
    # Class by class: adding all voxels up in a few bins lets them queue for these on a GPU.
    counts = torch.stack([(counted == label).sum() for label in range(num_classes)])
    shares = counts / counts.sum().clamp_min(1)
    return num_classes * (-shares).softmax(0)


def weight_classes(loss: nn.Module) -> None:
    """Replace the cross-entropy of nnU-Net's loss, with or without its deep supervision.

    Raises:
        NotImplementedError: the loss has no softmax cross-entropy, because the labels are regions.
    """
    inner = getattr(loss, "loss", loss)
    plain = getattr(inner, "ce", None)
    if not isinstance(plain, RobustCrossEntropyLoss):
        raise NotImplementedError(
            "softmax_weighted weights the classes of a softmax, but these labels are regions, each with a sigmoid of "
            "its own: leave it False."
        )
    inner.ce = SoftmaxWeightedCrossEntropy(plain.ignore_index)
