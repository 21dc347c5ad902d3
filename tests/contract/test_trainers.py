"""What every registered trainer promises; a new one gets these tests for free."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ext import registry
from nnunet_ext.check.phantom import workspace
from nnunet_ext.check.trainer import check
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.protocols import only_predicts
from nnunet_ext.trainers.adamw import AdamWMixin
from nnunet_ext.trainers.nnUNetTrainerImplicit import nnUNetTrainerImplicit
from nnunet_ext.trainers.nnUNetTrainerImplicitLite import nnUNetTrainerImplicitLite
from tests.contract.variants import slow_variants

CPU = torch.device("cpu")
TRAINERS = [name for name in registry.names("trainers") if not only_predicts(trainer_class(name))]


@pytest.fixture(params=TRAINERS)
def name(request: pytest.FixtureRequest) -> str:
    return f"{request.param}_1epochs_2iters"


@pytest.fixture(autouse=True)
def _small_and_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for trainer in (nnUNetTrainerImplicit, nnUNetTrainerImplicitLite):
        monkeypatch.setattr(trainer, "decoder_width", 64)


def trainer_of(name: str, identifier: int, continue_training: bool = False) -> Any:
    return get_trainer_from_args(str(identifier), "3d_fullres", 0, name, "nnUNetPlans", continue_training, CPU)


def test_at_least_one_trainer_is_registered() -> None:
    assert TRAINERS


@pytest.mark.parametrize("registered", slow_variants(registry.names("trainers")))
def test_passes_the_check_that_others_are_given(registered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 2D, 3D and anisotropic, with channels, regions and the ignore label; see docs/how-to/add-a-method.md."""
    for attribute in ("decoder_width", "decoder_depth"):  # wide ones take most of the time
        if hasattr(trainer_class(registered), attribute):
            monkeypatch.setattr(trainer_class(registered), attribute, 4)
    with workspace():
        rows = list(check(registered))
    wanted = "ok" if registered in TRAINERS else "warning"
    assert [row for row in rows if row.level != wanted] == []


def test_trains_an_epoch_and_resumes(name: str, dataset: Callable[[str], int]) -> None:
    identifier = dataset("labels")
    trainer = trainer_of(name, identifier)
    trainer.run_training()
    losses = trainer.logger.get_value("train_losses", step=None)
    assert torch.isfinite(torch.tensor(losses)).all()

    resumed = trainer_of(name, identifier, continue_training=True)
    maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
    assert resumed.current_epoch == 1


def test_the_predictor_averages_folds_also_where_it_moves_the_network(
    name: str, dataset: Callable[[str], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A move to the CPU does nothing; to a GPU it leaves inference tensors, as this detour over float64 does."""
    trainer = trainer_of(name, dataset("labels"))
    trainer.initialize()
    plans = copy.deepcopy(trainer.plans_manager.plans)
    plans["configurations"]["3d_fullres"]["patch_size"] = [16, 16, 16]
    files = {"plans.json": plans, "dataset.json": trainer.dataset_json}
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    for fold in (0, 1):
        (tmp_path / f"fold_{fold}").mkdir()
        with torch.no_grad():
            for parameter in trainer.network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        trainer.save_checkpoint(str(tmp_path / f"fold_{fold}" / "checkpoint_final.pth"))
    image = torch.randn(2, 16, 16, 16)

    def predicted(*folds: int) -> torch.Tensor:
        predictor = nnUNetPredictor(use_mirroring=False, device=CPU, perform_everything_on_device=False)
        predictor.initialize_from_trained_model_folder(str(tmp_path), folds, "checkpoint_final.pth")
        return predictor.predict_logits_from_preprocessed_data(image)

    wanted = (predicted(0) + predicted(1)) / 2
    to = torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module,
        "to",
        lambda self, *a, **k: to(to(to(self, torch.float64), torch.float32) if CPU in a else self, *a, **k),
    )
    torch.testing.assert_close(predicted(0, 1), wanted, rtol=1e-2, atol=1e-2)


def test_pretrained_weights_of_the_same_trainer_are_taken_but_for_the_heads(
    name: str, dataset: Callable[[str], int], tmp_path: Path
) -> None:
    trainer = trainer_of(name, dataset("labels"))
    arguments = (trainer.plans_manager, trainer.configuration_manager, 2, 3)
    pretrained, network = (type(trainer).build_network_architecture(*arguments) for _ in range(2))
    torch.save({"network_weights": pretrained.state_dict()}, tmp_path / "pretrained.pth")
    heads = {key: value.clone() for key, value in network.state_dict().items() if ".seg_layers." in key}
    load_pretrained_weights(network, str(tmp_path / "pretrained.pth"))
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, heads.get(key, pretrained.state_dict()[key]), rtol=0, atol=0)


def test_a_failed_save_leaves_the_last_checkpoint_whole(
    name: str, dataset: Callable[[str], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(name, dataset("labels"))
    trainer.initialize()
    path = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    whole = path.read_bytes()

    def full_disk(content: Any, target: str) -> None:
        Path(target).write_bytes(whole[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", [TRAINERS[0], registry.CORE_TRAINER])
def test_worse_network_does_not_replace_the_best_after_a_continuation(
    name: str, dataset: Callable[[str], int], tmp_path: Path
) -> None:
    trainer = trainer_of(f"{name}_3epochs_1iters", dataset("labels"))
    trainer.initialize()
    trainer._best_ema = 0.2
    for epoch, dice in enumerate((0.2, 0.9)):
        trainer.logger.log("mean_fg_dice", dice, epoch)
    trainer.current_epoch = 1
    path = str(tmp_path / "checkpoint_latest.pth")
    trainer.save_checkpoint(path)  # as nnU-Net does, before it looks whether the epoch is the best

    resumed = trainer_of(f"{name}_3epochs_1iters", dataset("labels"))
    resumed.load_checkpoint(path)
    assert resumed._best_ema == pytest.approx(0.27)


@pytest.mark.parametrize("name", [n for n in TRAINERS if issubclass(trainer_class(n), AdamWMixin)])
def test_a_checkpoint_of_sgd_is_loaded_for_validation_and_not_continued_with_adamw(
    name: str, dataset: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, identifier = f"{name}_3epochs_1iters", dataset("labels")
    trainer = trainer_of(name, identifier)
    with monkeypatch.context() as patched:
        patched.setattr(type(trainer), "configure_optimizers", nnUNetTrainer.configure_optimizers)
        trainer.initialize()
    for parameter in trainer.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.logger.log("mean_fg_dice", 0.2, 0)
    path = str(Path(trainer.output_folder, "checkpoint_latest.pth"))
    trainer.save_checkpoint(path)

    resumed = trainer_of(name, identifier)
    resumed.load_checkpoint(path)  # as --val does
    assert resumed.current_epoch == 1
    with pytest.raises(UsageError, match="trains with AdamW, the checkpoint of epoch 1"):
        resumed.run_training()


def test_second_training_of_a_fold_is_refused_and_validation_is_not(
    dataset: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, identifier = f"{registry.CORE_TRAINER}_1epochs_1iters", dataset("labels")
    first = trainer_of(name, identifier)
    first.initialize()
    first.save_checkpoint(str(Path(first.output_folder, "checkpoint_final.pth")))
    refused = []

    def train_again(*_: Any) -> None:
        with pytest.raises(UsageError, match="one training at a time") as caught:
            trainer_of(name, identifier).run_training()
        refused.append(caught.value)
        maybe_load_checkpoint(trainer_of(name, identifier), continue_training=False, validation_only=True)

    monkeypatch.setattr(first, "on_train_start", train_again)
    first.current_epoch = first.num_epochs
    monkeypatch.setattr(first, "on_train_end", lambda: None)
    first.run_training()
    assert refused
