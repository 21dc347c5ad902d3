"""Cross-entropy that weights rare classes up, for heavy class imbalance.

Wang, Blackie, Miguel-Aliaga, Bai 2022, "Memory-efficient Segmentation of High-resolution Volumetric MicroCT Images"
(MIDL), appendix A.4, Eq. 1: ``w_c = softmax_c(S / n_c)``, n_c the voxels of class c, S their sum. Taken literally the
rarest class has all the weight once its share is below a few percent, and a class without voxels has no weight at all.
So by default the softmax is of logarithms.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Form = Literal["stable", "paper"]

_TEMPERATURE = 2.0  # 1 would give all classes the same share of the loss, were it of a single voxel


class SoftmaxWeightedCrossEntropy(RobustCrossEntropyLoss):
    """Cross-entropy with weights of the classes from the labels given, n_c voxels of class c among S.

    ``"stable"``: ``w_c = softmax_c(log(S / n_c) / 2)``, in proportion to ``sqrt(S / n_c)``; ``"paper"``:
    ``w_c = softmax_c(S / n_c)``. Classes without voxels are left out. The loss is ``sum w ce / sum w`` over the voxels,
    PyTorch's mean, so only the ratios of the weights matter.

    Args:
        ignore_index: Label that counts neither among the voxels nor in the loss.
        form: Which weights.

    Shape: logits (B, C, *patch), labels (B, 1, *patch) or (B, *patch) -> scalar.

    Raises:
        ValueError: `form` is neither.
    """

    def __init__(self, ignore_index: int = -100, form: Form = "stable") -> None:
        super().__init__(ignore_index=ignore_index)
        if form not in get_args(Form):
            raise ValueError(f'softmax_weighted must be True, False, "stable" (as True) or "paper", got {form!r}.')
        self.form: Form = form

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the weighted mean over the labels, in float32 or finer: weights leave float16."""
        labels = (target[:, 0] if target.ndim == input.ndim else target).long()
        weight = class_weights(labels, input.shape[1], self.ignore_index, self.form)
        logits = input.to(torch.promote_types(input.dtype, weight.dtype))
        return F.cross_entropy(logits, labels, weight.to(logits.dtype), ignore_index=self.ignore_index)


def class_weights(labels: Tensor, num_classes: int, ignore_index: int, form: Form = "stable") -> Tensor:
    """Weights (num_classes,) of the classes, float32, their sum 1; see `SoftmaxWeightedCrossEntropy`.

    Args:
        labels: Int64, of any shape.
        num_classes: Number of classes.
        ignore_index: Label that does not count.
        form: Which weights.
    """
    counted = labels.masked_fill(labels == ignore_index, -1)
    # Class by class: adding all voxels up in a few bins lets them queue for these on a GPU.
    counts = torch.stack([(counted == label).sum() for label in range(num_classes)])
    rarity = counts.sum() / counts.clamp_min(1)
    scores = rarity if form == "paper" else rarity.log() / _TEMPERATURE
    # Not -inf, whose softmax is not a number where no class has a voxel.
    return scores.masked_fill(counts == 0, torch.finfo(scores.dtype).min).softmax(0)


def weight_classes(loss: nn.Module, form: Form | Literal[True] = "stable") -> None:
    """Replace the cross-entropy of nnU-Net's loss, with or without its deep supervision.

    Args:
        loss: nnU-Net's loss.
        form: Which weights; True: ``"stable"``.

    Raises:
        NotImplementedError: the loss has no softmax cross-entropy, because the labels are regions.
        ValueError: `form` is none.
    """
    inner = getattr(loss, "loss", loss)
    plain = getattr(inner, "ce", None)
    if not isinstance(plain, RobustCrossEntropyLoss):
        raise NotImplementedError(
            "softmax_weighted weights the classes of a softmax, but these labels are regions, each with a sigmoid of "
            "its own: leave it False."
        )
    inner.ce = SoftmaxWeightedCrossEntropy(plain.ignore_index, "stable" if form is True else form)
