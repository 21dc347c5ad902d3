"""What no trainer lets into its weights and statistics: NaN and infinity, from wherever they come."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import get_trainer_from_args
from torch import Tensor

from nnunet_ext import registry
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.protocols import only_predicts
from nnunet_ext.trainers import finite_steps
from nnunet_ext.trainers.nnUNetTrainerImplicit import nnUNetTrainerImplicit
from nnunet_ext.trainers.nnUNetTrainerImplicitLite import nnUNetTrainerImplicitLite
from tests.contract.variants import slow_variants

CPU = torch.device("cpu")
TRAINERS = ["nnUNetTrainer", *(n for n in registry.names("trainers") if not only_predicts(trainer_class(n)))]
NAN, INF = float("nan"), float("inf")
Started = Callable[..., Any]


@pytest.fixture
def started(dataset: Callable[[str], int], monkeypatch: pytest.MonkeyPatch) -> Started:
    """Make a trainer in its first epoch; its log is `said`."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for trainer in (nnUNetTrainerImplicit, nnUNetTrainerImplicitLite):
        monkeypatch.setattr(trainer, "decoder_width", 16)

    def start(name: str, kind: str = "labels") -> Any:
        torch.manual_seed(0)
        arguments = ("3d_fullres", 0, f"{name}_1epochs_4iters", "nnUNetPlans", False, CPU)
        trainer = get_trainer_from_args(str(dataset(kind)), *arguments)
        trainer.said = []
        trainer.on_train_start()
        trainer.print_to_log_file = lambda *text, **_: trainer.said.append(" ".join(map(str, text)))
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        return trainer

    return start


def state(trainer: Any) -> dict[str, Tensor]:
    """Weights and the optimiser's memory."""
    found = {key: value.clone() for key, value in trainer.network.named_parameters()}
    for index, memory in trainer.optimizer.state_dict()["state"].items():
        found |= {f"{index}.{k}": v.clone() for k, v in memory.items() if isinstance(v, Tensor)}
    return found


def spoiled(batch: dict[str, Any], value: float) -> dict[str, Any]:
    data = batch["data"].clone()
    data[0, 0, 0, 0, 0] = data[0, 0, 12, 12, 12] = value  # some passes see the centre alone
    return {**batch, "data": data}


def store_nan(trainer: Any, damaged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let two voxels of a stored image be NaN."""
    load = trainer.dataset_class.load_case

    def with_nan(self: Any, key: str) -> Any:
        image, *rest = load(self, key)
        image = np.array(image[:])
        image[0, :2, 0, 0] = NAN if key == damaged else 0
        return image, *rest

    monkeypatch.setattr(trainer.dataset_class, "load_case", with_nan)


@pytest.mark.parametrize("name", slow_variants(TRAINERS))
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_step_on_an_image_that_is_not_finite_changes_nothing(name: str, value: float, started: Started) -> None:
    trainer = started(name)
    batch = next(trainer.dataloader_train)
    losses = [trainer.train_step(batch)]  # the optimiser has a memory from here on
    before = state(trainer)
    losses.append(trainer.train_step(spoiled(batch, value)))
    torch.testing.assert_close(state(trainer), before, rtol=0, atol=0)
    assert any(str(batch["keys"][0]) in line for line in trainer.said)
    losses.append(trainer.train_step(batch))
    after = state(trainer)
    assert all(tensor.isfinite().all() for tensor in (*after.values(), *trainer.network.buffers()))
    assert any((after[key] != before[key]).any() for key in before)
    trainer.on_train_epoch_end(losses)
    assert np.isfinite(trainer.logger.get_value("train_losses", step=-1))
    assert any(" steps changed nothing" in line for line in trainer.said)


def test_running_statistics_come_back_as_the_step_began(started: Started) -> None:
    trainer = started("nnUNetTrainerHalfWidthBN")
    trainer.train_step(next(trainer.dataloader_train))
    before = copy.deepcopy({k: v for k, v in trainer.network.state_dict().items() if "running_" in k or "tracked" in k})
    assert before
    trainer.train_step(spoiled(next(trainer.dataloader_train), NAN))
    after = trainer.network.state_dict()
    torch.testing.assert_close({key: after[key] for key in before}, before, rtol=0, atol=0)


@pytest.mark.parametrize("scaler", [False, True])
def test_a_finite_image_that_makes_running_statistics_infinite_changes_nothing(scaler: bool, started: Started) -> None:
    trainer = started("nnUNetTrainerHalfWidthBN")
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaler else None
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    before = {**state(trainer), **{key: value.clone() for key, value in trainer.network.named_buffers()}}
    huge = {**batch, "data": batch["data"].clone()}
    huge["data"][1, 0, 0, 0, 0] = 1e20
    trainer.train_step(huge)
    torch.testing.assert_close({**state(trainer), **dict(trainer.network.named_buffers())}, before, rtol=0, atol=0)
    largest = f"the batch is finite, its largest value is 1e+20, in {batch['keys'][1]}."
    assert f"A step is left out, its statistic of batch norm is NaN or infinite: {largest}" in trainer.said


def test_a_gradient_that_is_not_finite_changes_nothing_where_the_loss_is(started: Started) -> None:
    trainer = started("nnUNetTrainer")
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    before = state(trainer)
    parameter = next(p for p in trainer.network.parameters() if p.grad is not None)
    hook = parameter.register_hook(lambda gradient: gradient * INF)
    losses = [trainer.train_step(batch)]
    hook.remove()
    assert np.isfinite(losses[0]["loss"])
    assert any("its gradient is NaN or infinite: the batch is finite" in line for line in trainer.said)
    torch.testing.assert_close(state(trainer), before, rtol=0, atol=0)
    trainer.on_train_epoch_end(losses)
    assert any(line.startswith("1 of 2 steps changed nothing") for line in trainer.said)


def test_the_scalers_steps_are_left_to_it_and_told(started: Started) -> None:
    trainer = started("nnUNetTrainer")
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    losses = [trainer.train_step(spoiled(batch, NAN)), trainer.train_step(batch)]
    trainer.on_train_epoch_end(losses)
    assert trainer.grad_scaler.get_scale() == 2.0**10  # the batch was at fault, no overflow
    trainer.on_train_epoch_start()
    hook = trainer.network.register_forward_hook(lambda _, __, levels: [level * INF for level in levels])
    losses = [trainer.train_step(batch)]
    hook.remove()
    losses.append(trainer.train_step(batch))
    trainer.on_train_epoch_end(losses)
    assert trainer.grad_scaler.get_scale() == 2.0**9
    assert any("from 1024 to 512" in line for line in trainer.said)
    assert sum(line.startswith("1 of 2 steps changed nothing") for line in trainer.said) == 2


def test_a_scale_that_falls_and_falls_ends_the_training(started: Started) -> None:
    trainer = started("nnUNetTrainer")
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-12)
    batch, loss = next(trainer.dataloader_train), trainer.loss
    trainer.loss = lambda *arguments: loss(*arguments) * NAN
    trainer.train_step(batch)
    trainer.train_step(batch)
    with pytest.raises(UsageError, match=r"a scale of at least 6.1\d*e-05, got 3.05\d*e-05 in epoch 0.*\(--c\)"):
        trainer.train_step(batch)


@pytest.mark.parametrize("scaler", [False, True])
def test_an_infinite_loss_whose_gradient_is_finite_changes_nothing(scaler: bool, started: Started) -> None:
    trainer = started("nnUNetTrainer")
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaler else None
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    before = state(trainer)

    hook = trainer.loss.register_forward_hook(lambda _, __, loss: loss.detach() * INF + loss - loss.detach())
    trainer.loss._forward_hooks.move_to_end(hook.id, last=False)  # before ours
    result = trainer.train_step(batch)
    hook.remove()
    assert not np.isfinite(result["loss"])
    torch.testing.assert_close(state(trainer), before, rtol=0, atol=0)
    assert any("the batch is finite" in line for line in trainer.said)


def test_an_optimiser_made_anew_and_a_scaler_that_is_off_are_looked_at_too(started: Started) -> None:
    trainer = started("nnUNetTrainer")
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    trainer.optimizer, _ = trainer.configure_optimizers()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = state(trainer)
    trainer.train_step(spoiled(batch, NAN))
    torch.testing.assert_close(state(trainer), before, rtol=0, atol=0)


def test_one_branch_of_two_that_gives_nan_for_good_ends_the_training(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite_steps, "_PATIENCE", 3)
    trainer = started("nnUNetTrainerMeCascade")
    batch = next(trainer.dataloader_train)
    trainer.branches[0].network.encoder.stages[0].register_forward_hook(lambda _, __, features: features * NAN)
    trainer.train_step(batch)
    trainer.train_step(batch)
    with pytest.raises(UsageError, match="got others in 3 steps in a row"):
        trainer.train_step(batch)


def test_a_training_whose_losses_stay_nan_ends(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite_steps, "_PATIENCE", 3)
    trainer = started("nnUNetTrainer")
    whole, loss = trainer.loss, trainer.loss
    trainer.loss = lambda *arguments: loss(*arguments) * NAN
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    trainer.train_step(batch)
    trainer.loss = whole
    trainer.train_step(batch)  # not in a row any more
    trainer.loss = lambda *arguments: loss(*arguments) * NAN
    trainer.train_step(batch)
    trainer.train_step(batch)
    with pytest.raises(UsageError, match=r"in 3 steps in a row, epoch 0: .* \(--c\)"):
        trainer.train_step(batch)
    assert any("the batch is finite" in line for line in trainer.said)


def test_a_stored_image_that_is_not_finite_ends_the_training(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = started("nnUNetTrainer")
    batch = next(trainer.dataloader_train)
    damaged = str(batch["keys"][0])
    store_nan(trainer, damaged, monkeypatch)
    with pytest.raises(UsageError, match=rf"in 2 of \d+ voxels of {damaged} in .*: repair the raw image"):
        trainer.train_step(spoiled(batch, NAN))


@pytest.mark.parametrize("name", ["nnUNetTrainer", "nnUNetTrainerMeUNet"])
def test_a_validation_loss_that_is_not_finite_is_told(name: str, started: Started) -> None:
    trainer = started(name)
    batch = next(trainer.dataloader_val)
    trainer.on_validation_epoch_start()
    trainer.validation_step(batch)
    assert not any("validation" in line for line in trainer.said)
    trainer.loss.register_forward_hook(lambda _, __, loss: loss * NAN)
    for _ in range(10):
        trainer.validation_step(batch)
    told = [line for line in trainer.said if "validation batch" in line]
    assert len(told) == 5
    assert all("is NaN or infinite: the batch is finite" in line for line in told)
    assert all(any(str(key) in line for key in batch["keys"]) for line in told)


@pytest.mark.parametrize("name", ["nnUNetTrainer", "nnUNetTrainerMeUNet"])
def test_a_stored_image_that_is_not_finite_ends_the_validation(
    name: str, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = started(name)
    batch = next(trainer.dataloader_val)
    store_nan(trainer, str(batch["keys"][0]), monkeypatch)
    trainer.on_validation_epoch_start()
    with pytest.raises(UsageError, match=rf"in 2 of \d+ voxels of {batch['keys'][0]} in .*: repair the raw image"):
        trainer.validation_step(spoiled(batch, NAN))


def test_the_whole_training_survives_one_bad_batch(dataset: Callable[[str], int], tmp_path: Path) -> None:
    arguments = ("3d_fullres", 0, "nnUNetTrainerFasterFusionBN_2epochs_3iters", "nnUNetPlans", False, CPU)
    trainer = get_trainer_from_args(str(dataset("labels")), *arguments)
    step, seen = trainer.train_step, []

    def second_is_bad(batch: dict[str, Any]) -> dict[str, Any]:
        seen.append(batch)
        return step(spoiled(batch, NAN) if len(seen) == 2 else batch)

    trainer.train_step = second_is_bad
    trainer.run_training()
    saved = torch.load(Path(trainer.output_folder, "checkpoint_final.pth"), weights_only=False)
    assert all(tensor.isfinite().all() for tensor in saved["network_weights"].values())
    assert np.isfinite(saved["logging"]["train_losses"]).all()
