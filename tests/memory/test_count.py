"""Counted trainings: against parts known by hand, against the network's alone, for every registered trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from nnunet_ext import registry
from nnunet_ext.memory.autocast import CudaAutocast, mixed_precision
from nnunet_ext.memory.count import training_memory, training_operations
from nnunet_ext.memory.network import count_parameters, measure_size, measure_step
from nnunet_ext.memory.step import TrainerStep
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.source import Source
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.protocols import HasTeacher, only_predicts
from tests.settings import tiny

TRAINERS = [name for name in registry.names("trainers") if not only_predicts(trainer_class(name))]
VOXELS = 2 * 16**3  # of a batch of the tiny setting


def with_labels(setting: Setting, **labels: Any) -> Setting:
    return Setting(plans=setting.plans, dataset={**setting.dataset, **labels}, configuration=setting.configuration)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainers_step_is_counted(trainer: str, setting: Setting) -> None:
    memory = training_memory(setting, trainer)
    weights = 4 * count_parameters(setting.builder(trainer))
    assert memory.gradients == weights
    found = trainer_class(trainer)
    teacher = 4 * count_parameters(found.teacher_builder(setting)) if isinstance(found, HasTeacher) else 0
    assert weights + teacher <= memory.parameters < 1.1 * (weights + teacher) + 64  # with statistics of batch norm
    assert memory.optimizer >= weights
    assert memory.peak >= memory.parameters + memory.optimizer + memory.held
    assert memory.expected == memory.peak + memory.allowance


@pytest.mark.parametrize("trainer", [name for name in TRAINERS if isinstance(trainer_class(name), HasTeacher)])
def test_a_teacher_costs_its_weights_its_answer_and_a_forward_pass(trainer: str, setting: Setting) -> None:
    alone = training_memory(setting, trainer.removesuffix("Distilled"))
    taught = training_memory(setting, trainer)
    build = trainer_class(trainer).teacher_builder(setting)
    answer = 2 * setting.num_classes * VOXELS  # in float16
    assert taught.parameters - alone.parameters >= 4 * count_parameters(build)
    assert taught.optimizer == alone.optimizer
    assert taught.peak - alone.peak >= 4 * count_parameters(build)
    assert 0 < taught.held - alone.held < 30 * answer  # softened float32 probabilities of both in the loss
    forward = setting.batch_size * measure_size(build, setting.input_channels, setting.patch_size).macs
    assert (
        training_operations(setting, trainer) - training_operations(setting, trainer.removesuffix("Distilled"))
        == forward
    )


@pytest.mark.parametrize("regions", [False, True])
def test_images_and_labels_of_a_real_step_are_random(regions: bool, setting: Setting) -> None:
    labels: dict[str, Any] = {"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}}
    if regions:
        labels = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
    step = TrainerStep(with_labels(setting, **labels), "nnUNetTrainer")
    x, targets = step._batch()
    assert x.std() > 0.9
    for target in targets.values():
        assert set(target.unique().tolist()) == ({False, True} if regions else {0, 1, 2})
    assert len(list(step.passes())) == 1


@pytest.mark.parametrize(
    ("trainer", "states"), [("nnUNetTrainer", 1), ("nnUNetTrainerImplicit", 2), ("nnUNetTrainerReversible", 2)]
)
def test_optimizers_state_is_that_of_the_trainers_own(trainer: str, states: int, setting: Setting) -> None:
    memory = training_memory(setting, trainer)
    assert memory.optimizer == pytest.approx(states * memory.gradients, rel=0.01)


def test_a_schedule_changes_nothing(setting: Setting) -> None:
    assert training_memory(setting, "nnUNetTrainer_4epochs_50iters") == training_memory(setting, "nnUNetTrainer")


def test_what_a_trainer_says_in_its_init_counts(setting: Setting) -> None:
    plain, single = (training_memory(setting, name) for name in ("nnUNetTrainer", "nnUNetTrainerNoDeepSupervision"))
    assert single.held < plain.held


@pytest.mark.parametrize(
    "labels",
    [
        {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]},
        {"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}},
    ],
)
def test_regions_and_ignore_label_are_counted(labels: dict[str, Any], setting: Setting) -> None:
    assert training_memory(with_labels(setting, **labels), "nnUNetTrainer").peak > 0


def test_loss_of_many_classes_counts_in_float32() -> None:
    few, many = (training_memory(tiny(classes=n), "nnUNetTrainer") for n in (10, 40))
    # Softmax, one-hot labels and log-softmax are kept; the gradient of the last two comes on top.
    assert many.held - few.held > 12 * 30 * VOXELS
    assert many.peak - few.peak > 16 * 30 * VOXELS


@pytest.mark.parametrize(
    "trainer", ["nnUNetTrainer", pytest.param("nnUNetTrainerReversible", marks=pytest.mark.slow), "nnUNetTrainerMeUNet"]
)
@pytest.mark.parametrize("dtype", [torch.float16, None])
def test_agrees_with_the_count_of_the_network_alone(trainer: str, dtype: torch.dtype | None) -> None:
    setting = Source(patch=(96, 96, 96)).setting()
    counted = measure_step(setting.training_builder(trainer), 1, (96, 96, 96), 2, dtype)
    memory = training_memory(setting, trainer, mixed=dtype is not None)
    # There the loss is a stand-in, and weights and momentum are left out.
    assert memory.peak == pytest.approx(counted.peak + 2 * counted.parameters, rel=0.1)


def test_dtypes_are_those_of_cuda() -> None:
    x = (2, 4, 8, 8)
    with FakeTensorMode(), CudaAutocast():
        assert torch.empty(x, dtype=torch.float16).softmax(1).dtype == torch.float16
        with mixed_precision("cpu"):
            half = nn.Conv2d(4, 4, 1)(torch.empty(x))
            kept = [half, nn.functional.max_pool2d(half, 2), nn.InstanceNorm2d(4)(half)]
            grown = [half.softmax(1), half.log_softmax(1), half.sum(), nn.functional.interpolate(half, scale_factor=2)]
            grown.append(nn.functional.cross_entropy(half, torch.zeros(2, 8, 8).long()))
            targets = torch.zeros(x)
            grown.append(nn.functional.binary_cross_entropy_with_logits(half, targets))
    assert {found.dtype for found in kept} == {torch.float16}
    assert {found.dtype for found in grown} == {torch.float32}


def test_what_is_recomputed_has_the_dtypes_of_cuda_too() -> None:
    found = []

    def pooled(x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.avg_pool3d(x, 2)
        found.append(y.dtype)
        return y * y

    with FakeTensorMode(), CudaAutocast():
        with mixed_precision("cpu"):
            x = torch.empty(2, 4, 8, 8, 8, dtype=torch.float16, requires_grad=True)
            loss = checkpoint(pooled, x, use_reentrant=False, preserve_rng_state=False).sum()
        loss.backward()
    assert found == [torch.float16] * 2


def test_dropout_keeps_a_mask_of_bytes() -> None:
    saved: list[torch.Tensor] = []
    with FakeTensorMode(), CudaAutocast(), mixed_precision("cpu"):
        x = torch.empty(4, 4, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            nn.functional.dropout(x, 0.2)
    assert [t.dtype for t in saved] == [torch.bool]
