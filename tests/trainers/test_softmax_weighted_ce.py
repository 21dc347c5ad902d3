from __future__ import annotations

from typing import Literal

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch.nn import functional as F  # noqa: N812

from nnunet_ext.trainers.softmax_weighted_ce import Form, SoftmaxWeightedCrossEntropy, class_weights, weight_classes

IMBALANCED = torch.tensor([0] * 970 + [1] * 25 + [2] * 5)  # 97, 2.5 and 0.5 %


def test_weights_are_a_softmax_of_the_logarithms_of_rarity() -> None:
    roots = torch.tensor([0.97, 0.025, 0.005]) ** -0.5
    torch.testing.assert_close(class_weights(IMBALANCED, 3, -100), roots / roots.sum())


def test_weights_of_the_paper_are_equation_1() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [2] * 2)
    exponentials = torch.exp(11 / torch.tensor([6.0, 3.0, 2.0]))
    torch.testing.assert_close(class_weights(labels, 3, -100, "paper"), exponentials / exponentials.sum())


def test_classes_of_2_5_and_0_5_percent_weigh_differently_and_in_equation_1_only_the_rarest_weighs() -> None:
    _, small, smallest = class_weights(IMBALANCED, 3, -100).tolist()
    assert smallest == pytest.approx(5**0.5 * small)
    assert class_weights(IMBALANCED, 3, -100, "paper").tolist() == [0, 0, 1]


@pytest.mark.parametrize("form", ["stable", "paper"])
@pytest.mark.parametrize("ignored", [3, 0, -100])
def test_voxels_are_those_of_bincount(form: Form, ignored: int) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 4 if ignored == 3 else 3, (2, 7, 8, 9))
    counts = torch.bincount(labels[labels != ignored], minlength=3)
    rarity = counts.sum() / counts
    weights = (rarity if form == "paper" else rarity.log() / 2).masked_fill(counts == 0, -torch.inf).softmax(0)
    torch.testing.assert_close(class_weights(labels, 3, ignored, form), weights)


@pytest.mark.parametrize("form", ["stable", "paper"])
def test_an_absent_class_takes_nothing_from_the_others(form: Form) -> None:
    labels = torch.tensor([0] * 6 + [2] * 3)
    without = class_weights(labels.where(labels == 0, 1), 2, -100, form)
    torch.testing.assert_close(class_weights(labels, 4, -100, form), torch.tensor([without[0], 0, without[1], 0]))


@pytest.mark.parametrize("form", ["stable", "paper"])
def test_loss_and_gradient_are_finite_in_float16_with_one_voxel_among_millions(form: Form) -> None:
    labels = torch.zeros(1, 1, 2_000_000, dtype=torch.int16)
    labels[..., 7] = 1
    logits = torch.randn(1, 3, 2_000_000).half().requires_grad_()
    loss = SoftmaxWeightedCrossEntropy(form=form)(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert gradient.isfinite().all()
    torch.testing.assert_close(loss, SoftmaxWeightedCrossEntropy(form=form)(logits.double(), labels).float())


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
    assert class_weights(torch.full((4,), 3), 3, 3).isfinite().all()


def test_it_takes_the_place_of_nnunets_cross_entropy_and_keeps_the_ignore_label() -> None:
    loss = DeepSupervisionWrapper(DC_and_CE_loss({"do_bg": False}, {}, ignore_label=3), [1.0])
    weight_classes(loss)
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 6, 6, 6), torch.randint(0, 4, (2, 1, 6, 6, 6))
    wanted = SoftmaxWeightedCrossEntropy(3)(logits, labels) + loss.loss.dc(
        logits, labels.where(labels != 3, 0), loss_mask=labels != 3
    )
    torch.testing.assert_close(loss([logits], [labels]), wanted)


def test_the_form_is_chosen_by_name_true_is_the_stable_one_and_others_are_refused() -> None:
    loss = DC_and_CE_loss({}, {})
    choices: list[Form | Literal[True]] = [True, "stable", "paper"]
    for form, wanted in zip(choices, ["stable", "stable", "paper"], strict=True):
        weight_classes(loss, form)
        assert loss.ce.form == wanted
    with pytest.raises(ValueError, match=r"True, False, .* got 'literal'"):
        weight_classes(loss, "literal")  # type: ignore[arg-type]


def test_regions_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="leave it False"):
        weight_classes(DC_and_BCE_loss({}, {}))
