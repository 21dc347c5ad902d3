"""Large activations are told before float16 ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nnunet_ext.trainers import value_range
from nnunet_ext.trainers.value_range import ValueRangeMixin, largest_activations


class Scaled(nn.Module):
    """Two convolutions of one channel that multiply."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(1, 1, 1, bias=False) for _ in range(2))
        for convolution, factor in ((self.first, first), (self.second, second)):
            nn.init.constant_(convolution.weight, factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).float())


class Host:
    local_rank = 0
    device = torch.device("cpu")

    def __init__(self, network: nn.Module) -> None:
        self.network, self.said, self.validated = network, [], 0

    def on_validation_epoch_start(self) -> None: ...

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.validated += 1
        return {}

    def print_to_log_file(self, text: str) -> None:
        self.said.append(text)


class Trainer(ValueRangeMixin, Host): ...


def epoch(trainer: Trainer, batches: int = 2) -> None:
    trainer.on_validation_epoch_start()
    for _ in range(batches):
        trainer.validation_step({"data": torch.ones(2, 1, 4, 4)})


@pytest.fixture
def _float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(value_range, "nnunet_autocast", lambda device: torch.autocast("cpu", torch.float16))


def test_parts_are_named_with_their_largest_value() -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        found = largest_activations(Scaled(-300.0, 2.0), torch.ones(1, 1, 4, 4))
    assert found == {"first": 300.0, "second": 600.0}


def test_an_overflow_counts_as_infinity_and_float32_as_nothing() -> None:
    network, image = Scaled(300.0, 300.0), torch.ones(1, 1, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert largest_activations(network, image) == {"first": 300.0, "second": float("inf")}
        assert largest_activations(network, image * float("nan")) == dict.fromkeys(("first", "second"), float("inf"))
    assert largest_activations(network, image) == {}
    assert not network.first._forward_hooks


@pytest.mark.usefixtures("_float16")
def test_the_log_names_value_and_place_before_the_end_and_again_where_it_doubles() -> None:
    trainer = Trainer(Scaled(100.0, 40.0))  # 4000: below a sixteenth of 65504
    epoch(trainer)
    assert trainer.said == []
    nn.init.constant_(trainer.network.second.weight, 50.0)
    epoch(trainer)
    epoch(trainer)
    assert len(trainer.said) == 1
    assert trainer.said[0].startswith("Largest activation in float16: 5000, in second. At 65504 ")
    nn.init.constant_(trainer.network.second.weight, 99.0)
    epoch(trainer)
    assert len(trainer.said) == 1
    nn.init.constant_(trainer.network.second.weight, 1000.0)
    epoch(trainer)
    epoch(trainer)
    assert [": inf," in line for line in trainer.said] == [False, True]
    assert trainer.validated == 12


@pytest.mark.usefixtures("_float16")
def test_other_ranks_do_not_look() -> None:
    trainer = Trainer(Scaled(1000.0, 1000.0))
    trainer.local_rank = 1
    epoch(trainer)
    assert trainer.said == []


def test_without_mixed_precision_nothing_is_looked_at() -> None:
    trainer = Trainer(Scaled(1000.0, 1000.0))
    epoch(trainer)
    assert trainer.said == []
