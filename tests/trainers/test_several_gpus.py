"""What trainings on several GPUs refuse; what they do is in tests/contract/test_two_ranks.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from nnunet_ext.trainers.several_gpus import SeveralGPUsMixin


class Host:
    """What the mixin needs of nnU-Net's trainer."""

    was_trained = False

    def __init__(self, batch_size: int, batch_dice: bool, is_ddp: bool) -> None:
        self.configuration_manager = SimpleNamespace(batch_size=batch_size, batch_dice=batch_dice)
        self.is_ddp = is_ddp

    def run_training(self) -> None:
        self.was_trained = True


class Trainer(SeveralGPUsMixin, Host):
    """As our trainers are made."""


@pytest.fixture(autouse=True)
def _four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)


def test_batch_that_gpus_do_not_divide_is_refused_where_the_loss_gathers_it() -> None:
    trainer = Trainer(batch_size=6, batch_dice=True, is_ddp=True)
    with pytest.raises(ValueError, match="got batch size 6 and 4 GPUs: give another -num_gpus"):
        trainer.run_training()
    assert not trainer.was_trained


@pytest.mark.parametrize(("batch_size", "batch_dice", "is_ddp"), [(8, True, True), (6, False, True), (6, True, False)])
def test_all_other_batches_are_trained(batch_size: int, batch_dice: bool, is_ddp: bool) -> None:
    trainer = Trainer(batch_size, batch_dice, is_ddp)
    trainer.run_training()
    assert trainer.was_trained
