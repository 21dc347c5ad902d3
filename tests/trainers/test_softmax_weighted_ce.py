from __future__ import annotations

from math import e

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch.nn import functional as F  # noqa: N812

from nnunet_ext.trainers.softmax_weighted_ce import SoftmaxWeightedCrossEntropy, class_weights, weight_classes


def test_weights_are_the_softmax_of_the_negative_shares() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    shares = torch.tensor([0.6, 0.3, 0.1])
    torch.testing.assert_close(class_weights(labels, 3, -100), 3 * torch.exp(-shares) / torch.exp(-shares).sum())


def test_a_class_that_is_everywhere_weighs_e_times_less_than_an_absent_one() -> None:
    weights = class_weights(torch.zeros(5, dtype=torch.int64), 2, -100)
    assert float(weights[1] / weights[0]) == pytest.approx(e)


@pytest.mark.parametrize("ignored", [3, 0, -100])
def test_shares_are_those_of_bincount(ignored: int) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 4 if ignored == 3 else 3, (2, 7, 8, 9))
    counts = torch.bincount(labels[labels != ignored], minlength=3)
    weights = 3 * (-counts / counts.sum()).softmax(0)
    torch.testing.assert_close(class_weights(labels, 3, ignored), weights, rtol=0, atol=0)


def test_loss_is_the_mean_weighted_by_each_voxels_class() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 1, 4, 5)).short()
    weights = class_weights(labels.long(), 3, -100).double()[labels[:, 0].long()]
    each = F.cross_entropy(logits, labels[:, 0].long(), reduction="none")
    found = SoftmaxWeightedCrossEntropy()(logits, labels)
    torch.testing.assert_close(found, (weights * each).sum() / weights.sum())
    torch.testing.assert_close(SoftmaxWeightedCrossEntropy()(logits, labels[:, 0]), found)


def test_ignored_voxels_count_neither_in_the_shares_nor_in_the_loss() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 3, 40), torch.randint(0, 3, (1, 40))
    kept = labels.clone()
    kept[0, 25:] = 3
    found = SoftmaxWeightedCrossEntropy(3)(logits, kept)
    torch.testing.assert_close(found, SoftmaxWeightedCrossEntropy()(logits[..., :25], labels[:, :25]))
    assert class_weights(torch.full((4,), 3), 3, 3).tolist() == [1, 1, 1]


def test_it_takes_the_place_of_nnunets_cross_entropy_and_keeps_the_ignore_label() -> None:
    loss = DeepSupervisionWrapper(DC_and_CE_loss({"do_bg": False}, {}, ignore_label=3), [1.0])
    weight_classes(loss)
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 6, 6, 6), torch.randint(0, 4, (2, 1, 6, 6, 6))
    wanted = SoftmaxWeightedCrossEntropy(3)(logits, labels) + loss.loss.dc(
        logits, labels.where(labels != 3, 0), loss_mask=labels != 3
    )
    torch.testing.assert_close(loss([logits], [labels]), wanted)


def test_regions_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="leave it False"):
        weight_classes(DC_and_BCE_loss({}, {}))
