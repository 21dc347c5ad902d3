"""Training with the VAE branch as nnU-Net trains on CUDA, in float16 with a gradient scaler; emulated on the CPU."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as host

from nnunet_ext import registry
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.trainers.vae import VAETrainerMixin
from tests.settings import tiny

TRAINERS = [name for name in registry.names("trainers") if issubclass(trainer_class(name), VAETrainerMixin)]


@pytest.fixture(params=TRAINERS)
def trainer(request: pytest.FixtureRequest, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The trainer, initialised for training on the CPU with what nnU-Net has on CUDA: float16 and a gradient scaler."""
    monkeypatch.setattr(host, "dummy_context", partial(torch.autocast, "cpu", dtype=torch.float16))
    setting = tiny()
    plans = {**deepcopy(dict(setting.plans)), "continue_training": False}
    plans["configurations"][setting.configuration]["data_identifier"] = "none"
    content = workspace / "preprocessed" / plans["dataset_name"] / "none"
    content.mkdir(parents=True, exist_ok=True)
    (content / "case.npz").touch()  # by which nnU-Net chooses how it reads
    dataset = {**setting.dataset, "numTraining": 1, "file_ending": ".nii.gz"}
    torch.manual_seed(0)
    trainer = trainer_class(request.param)(plans, setting.configuration, 0, dataset, torch.device("cpu"))
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=65536)
    trainer.initialize()
    trainer.network.train()
    return trainer


def batch_of(trainer: Any, image: torch.Tensor) -> dict[str, Any]:
    sizes = [[round(16 * s) for s in scales] for scales in trainer._get_deep_supervision_scales()]
    return {"data": image, "target": [torch.randint(0, 3, (2, 1, *size)).short() for size in sizes]}


def test_no_step_is_lost_in_float16_and_kl_starts_at_zero(trainer: Any) -> None:
    divergences = []
    for _ in range(4):
        before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
        trainer.train_step(batch_of(trainer, torch.randn(2, 1, 16, 16, 16)))
        assert trainer.grad_scaler.get_scale() == 65536
        pairs = list(zip(before, trainer.network.parameters(), strict=True))
        assert all(new.isfinite().all() for _, new in pairs)
        assert any(not torch.equal(old, new) for old, new in pairs)
        divergences.append(trainer.loss.epoch_means()[2])
    assert divergences[0] == 0
    assert 0 < divergences[-1] < 0.1
