"""What each rank does in the DDP contract test; a module of its own because ranks are spawned."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.contract.test_architectures import build, image, loss_of, train_gradients
from tests.ranks import SIZE


def run(rank: int, name: str, compiled: bool, options: dict[str, Any]) -> None:
    """Two steps on this rank's half of the batch; gradients must equal those of one process on the whole."""
    x = image("3d", batch=2 * SIZE)
    expected = train_gradients(build(name, "3d", deep_supervision=True), x)
    network = build(name, "3d", deep_supervision=True).train()
    inner = torch.compile(network, backend="aot_eager") if compiled else network
    ddp = DistributedDataParallel(inner, **options)
    for _ in range(2):
        network.zero_grad()
        loss_of(ddp(x[2 * rank : 2 * rank + 2])).backward()
        for parameter, wanted in zip(network.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-5)
