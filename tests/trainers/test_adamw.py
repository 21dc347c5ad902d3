"""AdamW follows nnU-Net's schedule, and a training that began with another optimiser is not continued with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nnunet_ext.errors import UsageError
from nnunet_ext.trainers.adamw import AdamWMixin


class Host:
    """What the mixin needs of nnUNetTrainer."""

    initial_lr, weight_decay, num_epochs, current_epoch, output_folder = 1e-2, 3e-5, 10, 0, "fold_0"
    has_started = was_initialized = False

    def __init__(self) -> None:
        self.network: Any = nn.Linear(2, 1)

    def initialize(self) -> None:
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        self.was_initialized = True

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        return torch.optim.SGD(self.network.parameters(), self.initial_lr, momentum=0.99), None

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        self.has_started = True


class Trainer(AdamWMixin, Host):
    """The mixin on its host."""


class AMSGrad(Host):
    """nnU-Net's own nnUNetTrainerAdam."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        return torch.optim.AdamW(self.network.parameters(), self.initial_lr, amsgrad=True), None


def made(kind: type[Any] = Trainer) -> Any:
    """A trainer after a step."""
    trainer = kind()
    trainer.initialize()
    trainer.network(torch.ones(1, 2)).sum().backward()
    trainer.optimizer.step()
    return trainer


def test_its_learning_rate_decays_as_nnunets() -> None:
    trainer = made()
    (group,) = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert (group["lr"], group["weight_decay"]) == (1e-3, 1e-2)
    trainer.lr_scheduler.step(5)
    assert group["lr"] == pytest.approx(1e-3 * 0.5**0.9)


@pytest.mark.parametrize("other", [Host, AMSGrad])
@pytest.mark.parametrize("epoch", [0, 9])
def test_memory_of_another_optimiser_is_refused_before_the_first_step(other: type[Any], epoch: int) -> None:
    trainer = made()
    trainer.optimizer.load_state_dict(made(other).optimizer.state_dict())
    trainer.current_epoch = epoch
    with pytest.raises(UsageError, match=rf"Trainer trains with AdamW, .* epoch {epoch} .* in fold_0 away .*weights"):
        trainer.on_train_start()
    assert not trainer.has_started


def test_a_training_that_another_optimiser_has_finished_is_taken_and_nothing_of_its_memory() -> None:
    trainer, alone = made(), made()
    trainer.optimizer.load_state_dict(made(Host).optimizer.state_dict())
    assert trainer.optimizer.state_dict().keys() == alone.optimizer.state_dict().keys()
    assert trainer.optimizer.param_groups[0].keys() == alone.optimizer.param_groups[0].keys()
    trainer.current_epoch = trainer.num_epochs
    trainer.on_train_start()
    assert trainer.has_started
    trainer.optimizer.step()


def test_its_own_memory_and_a_new_training_are_taken() -> None:
    trainer, new, before = made(), Trainer(), made()
    trainer.optimizer.load_state_dict(before.optimizer.state_dict())
    memory, own = (one.optimizer.state_dict()["state"][0]["exp_avg"] for one in (before, trainer))
    assert torch.equal(own, memory)
    for one in (trainer, new):
        one.on_train_start()
        assert one.has_started
