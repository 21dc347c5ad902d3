"""Every registered architecture under DistributedDataParallel, two gloo ranks, as nnU-Net wraps it."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch.multiprocessing as mp

from nnunet_ext import registry
from tests.contract import ddp_worker


@pytest.mark.parametrize("name", registry.names("architectures"))
@pytest.mark.parametrize(
    ("compiled", "options"),
    [(False, {}), (False, {"find_unused_parameters": True}), (False, {"static_graph": True}), (True, {})],
)
def test_two_ranks_have_the_gradients_of_one_process(
    name: str, compiled: bool, options: dict[str, Any]
) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    mp.spawn(ddp_worker.run, args=(2, name, port, compiled, options), nprocs=2)
