"""Gradients of meU-net's step on two ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nnunet_ext.trainers.me_cascade import MeCascadeTrainerMixin
from tests.ranks import Ranks
from tests.trainers import me_unet_ddp_worker


@pytest.mark.parametrize("name", me_unet_ddp_worker.NETWORKS)
@pytest.mark.parametrize(
    ("compiled", "options"),
    [(False, {}), pytest.param(True, {}, marks=pytest.mark.slow), (False, {"gradient_as_bucket_view": True})],
)
def test_two_ranks_have_the_gradients_of_one_process(
    name: str, compiled: bool, options: dict[str, Any], ranks: Ranks
) -> None:
    ranks.run(me_unet_ddp_worker.run, name, compiled, options)


def test_gradients_of_the_cascade_are_averaged_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Linear(3, 2), nn.Linear(2, 1))
    trained = [p for p in network.parameters() if p is not network[1].bias]  # that of a level without a loss
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    expected = [1.5 * parameter.grad for parameter in trained]
    messages: list[int] = []
    monkeypatch.setattr(dist, "all_reduce", lambda message: messages.append(message.numel()) or message.mul_(3))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    MeCascadeTrainerMixin._average_over_ranks(SimpleNamespace(network=network))
    assert messages == [sum(parameter.numel() for parameter in trained)]
    torch.testing.assert_close([parameter.grad for parameter in trained], expected)
    assert network[1].bias.grad is None
