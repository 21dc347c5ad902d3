"""The loss of a student, against PyTorch's distributions in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

from nnunet_ext.trainers.distillation_loss import DistillationLoss, Lesson, divergence

IGNORE = 3


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(hard: nn.Module, weight: float = 0.3, temperature: float = 2.0, regions: bool = False) -> DistillationLoss:
    return DistillationLoss(hard, regions, temperature, weight, lambda teacher: teacher)


def dice_and_ce() -> nn.Module:
    return DC_and_CE_loss({"smooth": 1e-5, "do_bg": False, "ddp": False, "batch_dice": False}, {}, ignore_label=IGNORE)


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (2, 4, 3, 5, 6), (2, 4, 30)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_divergence_of_classes_is_that_of_categorical_distributions(shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = logits(*shape), logits(*shape, seed=1)
    student.requires_grad_()
    found = divergence(student, teacher, temperature, regions=False)
    exact = student.detach().double().requires_grad_()
    one, other = (Categorical(logits=(x / temperature).movedim(1, -1)) for x in (teacher.double(), exact))
    wanted = kl_divergence(one, other).flatten(1).mean(1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)


def test_divergence_of_regions_sums_those_of_bernoulli_distributions() -> None:
    student, teacher = logits(2, 3, 4, 5), logits(2, 3, 4, 5, seed=1)
    one, other = (Bernoulli(logits=x.double() / 2) for x in (teacher, student))
    wanted = kl_divergence(one, other).sum(1).flatten(1).mean(1)
    torch.testing.assert_close(divergence(student, teacher, 2.0, regions=True).double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("regions", [False, True])
def test_divergence_is_zero_and_flat_where_both_agree_also_in_half_precision(regions: bool) -> None:
    student = (10 * logits(1, 3, 4, 4)).half().requires_grad_()
    found = divergence(student, student.detach(), 2.0, regions)
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(0, abs=1e-6)
    found.sum().backward()
    assert float(student.grad.abs().max()) < 1e-3


def test_loss_weighs_labels_and_teacher_and_asks_it_at_full_resolution_only() -> None:
    output = [logits(2, 4, 8, 8), logits(2, 4, 4, 4, seed=1)]
    target = [torch.randint(3, (2, 1, 8, 8)), torch.randint(3, (2, 1, 4, 4))]
    hard = DeepSupervisionWrapper(dice_and_ce(), (0.7, 0.3))
    loss, teacher = loss_of(hard), logits(2, 4, 8, 8, seed=2)
    loss.lesson = Lesson(teacher)
    wanted = 0.7 * hard(output, target) + 0.3 * 4 * divergence(output[0], teacher, 2.0, False).mean()
    torch.testing.assert_close(loss(output, target), wanted)
    loss.lesson = None
    torch.testing.assert_close(loss(output, target), hard(output, target))


def test_ignored_voxels_are_masked_in_the_hard_part_alone() -> None:
    target = torch.randint(3, (1, 1, 8, 8))
    target[..., :4] = IGNORE

    def gradient(lesson: Lesson | None) -> Tensor:
        output = logits(1, 3, 8, 8).requires_grad_()
        loss = loss_of(dice_and_ce())
        loss.lesson = lesson
        loss(output, target).backward()
        return output.grad[..., :4].abs().sum(1)

    assert gradient(None).max() == 0
    assert gradient(Lesson(logits(1, 3, 8, 8, seed=2))).min() > 0


def test_sample_without_labels_learns_from_the_teacher_alone_and_with_its_whole_weight() -> None:
    output, teacher = logits(2, 3, 8, 8), logits(2, 3, 8, 8, seed=2)
    target = torch.randint(3, (2, 1, 8, 8))
    loss, hard = loss_of(dice_and_ce()), dice_and_ce()
    loss.lesson = Lesson(teacher, [1])
    parts = divergence(output, teacher, 2.0, False)
    wanted = 0.7 * hard(output[:1], target[:1]) / 2 + 4 * (0.3 * parts[0] + parts[1]) / 2
    torch.testing.assert_close(loss(output, target), wanted)
    loss.lesson = Lesson(teacher, [0, 1])
    torch.testing.assert_close(loss(output, target), 4 * parts.mean())


def test_epoch_means_tell_both_terms_apart() -> None:
    loss, output, target = loss_of(dice_and_ce()), logits(2, 3, 8, 8), torch.randint(3, (2, 1, 8, 8))
    assert loss.epoch_means() is None
    for seed in (2, 3):
        loss.lesson = Lesson(logits(2, 3, 8, 8, seed=seed))
        loss(output, target)
    soft = [float(divergence(output, logits(2, 3, 8, 8, seed=seed), 2.0, False).mean()) for seed in (2, 3)]
    assert loss.epoch_means() == pytest.approx((float(dice_and_ce()(output, target)), sum(soft) / 2), rel=1e-5)
    assert loss.epoch_means() is None


def test_output_of_another_shape_than_the_teachers_is_refused() -> None:
    loss = loss_of(dice_and_ce())
    loss.lesson = Lesson(logits(2, 3, 8, 8))
    with pytest.raises(NotImplementedError, match=r"one shape, got \(2, 3, 4, 4\) and \(2, 3, 8, 8\): distil"):
        loss(logits(2, 3, 4, 4), torch.randint(3, (2, 1, 4, 4)))


def test_other_outputs_of_a_network_reach_its_own_loss() -> None:
    class WithExtra(nn.Module):
        def forward(self, output: Any, target: Any) -> Tensor:
            first, extra = output
            return first.mean() + extra

    loss = loss_of(WithExtra(), weight=0.0)
    output = logits(2, 3, 4, 4)
    loss.lesson = Lesson(output)
    torch.testing.assert_close(loss((output, torch.ones(())), None), output.mean() + 1)
