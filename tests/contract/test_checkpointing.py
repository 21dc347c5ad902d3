"""Activation checkpointing in the real trainer: checkpoints are nnU-Net's own, and so is the training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ext.trainers.nnUNetTrainerActivationCheckpointing import nnUNetTrainerActivationCheckpointing
from tests.contract.test_me_unet import batch_of

KINDS = {"plain": PlainConvUNet, "resenc": ResidualEncoderUNet}


@pytest.fixture
def trainer_of(dataset: Callable[[str], int], workspace: Path) -> Callable[..., Any]:
    """Make an initialised trainer: ``trainer_of(nnUNetTrainer, "plain", seed=1)``."""

    def make(trainer_class: type[nnUNetTrainer], kind: str, seed: int = 0, name: str | None = None) -> Any:
        (folder,) = (workspace / "preprocessed").glob(f"Dataset{dataset('labels')}_*")
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        configuration = plans["configurations"]["3d_fullres"]
        configuration["patch_size"] = [16, 16, 16]
        network = KINDS[kind]
        architecture = configuration["architecture"]
        architecture["network_class_name"] = name or f"{network.__module__}.{network.__name__}"
        if kind == "resenc":
            architecture["arch_kwargs"]["n_blocks_per_stage"] = architecture["arch_kwargs"].pop("n_conv_per_stage")
        torch.manual_seed(seed)
        dataset_json = json.loads((folder / "dataset.json").read_text())
        arguments = ({**copy.deepcopy(plans), "continue_training": False}, "3d_fullres", 0, dataset_json)
        trainer = trainer_class(*arguments, torch.device("cpu"))
        trainer.initialize()
        trainer.set_deep_supervision_enabled(True)
        trainer.network.train()
        return trainer

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_network_is_the_hosts_with_the_same_weights_from_the_same_seed(kind: str, trainer_of: Any) -> None:
    ours, default = (trainer_of(t, kind).network for t in (nnUNetTrainerActivationCheckpointing, nnUNetTrainer))
    assert isinstance(ours, KINDS[kind])
    assert type(default) is KINDS[kind]
    wanted = default.state_dict()
    assert ours.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in ours.state_dict().items())
    assert ours.compute_conv_feature_map_size((16,) * 3) == default.compute_conv_feature_map_size((16,) * 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to_ours", [True, False])
def test_training_goes_on_from_a_checkpoint_of_the_other_trainer(
    kind: str, to_ours: bool, trainer_of: Any, tmp_path: Path
) -> None:
    pair: list[Any] = [nnUNetTrainer, nnUNetTrainerActivationCheckpointing]
    before, after = pair if to_ours else pair[::-1]
    first = trainer_of(before, kind)
    batch = batch_of(first)
    first.train_step(batch)
    first.current_epoch = 0
    first.save_checkpoint(str(tmp_path / "checkpoint.pth"))

    second = trainer_of(after, kind, seed=1)
    second.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    losses = [trainer.train_step(batch)["loss"] for trainer in (first, second)]
    assert losses[0] == losses[1]
    for mine, theirs in zip(first.network.parameters(), second.network.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    for trainer in (first, second):
        trainer.network.eval()
        trainer.set_deep_supervision_enabled(False)
    with torch.no_grad():
        assert torch.equal(first.network(batch["data"]), second.network(batch["data"]))


def test_plans_of_another_network_are_refused_with_a_cure(trainer_of: Any) -> None:
    name = "nnunet_ext.architectures.reversible_unet.ReversibleUNet"
    with pytest.raises(ValueError, match=f"PlainConvUNet and ResidualEncoderUNet, but these plans are for {name}: use"):
        trainer_of(nnUNetTrainerActivationCheckpointing, "plain", name=name)


def test_attributes_reach_the_network(trainer_of: Any) -> None:
    class nnUNetTrainerCheckpointedNorms(nnUNetTrainerActivationCheckpointing):
        recompute = "norms"
        samples_apart = False

    options = trainer_of(nnUNetTrainerCheckpointedNorms, "plain").network.recomputation
    assert (options.recompute, options.apart) == ("norms", False)


@pytest.mark.parametrize(("version", "splits"), [("2.5.1", False), ("2.8.0+cu128", False), ("2.9.1", True)])
def test_old_pytorch_does_not_split_a_compiled_network_under_ddp(
    version: str, splits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would refuse to: "DDPOptimizer backend: Found a higher order op in the graph" (seen with 2.5.1)."""
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(nnUNetTrainer, "initialize", lambda self: None)
    trainer = object.__new__(nnUNetTrainerActivationCheckpointing)
    trainer.is_ddp, trainer._do_i_compile = True, lambda: True
    trainer.print_to_log_file = lambda text: None
    with torch._dynamo.config.patch(optimize_ddp=True):
        trainer.initialize()
        assert torch._dynamo.config.optimize_ddp is splits
