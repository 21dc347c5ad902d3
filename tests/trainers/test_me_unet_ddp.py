"""Gradients of meU-net's step on two ranks."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch.multiprocessing as mp

from tests.trainers import me_unet_ddp_worker


@pytest.mark.parametrize("name", me_unet_ddp_worker.NETWORKS)
@pytest.mark.parametrize(
    ("compiled", "options"),
    [(False, {}), (True, {}), (False, {"gradient_as_bucket_view": True})],
)
def test_two_ranks_have_the_gradients_of_one_process(
    name: str, compiled: bool, options: dict[str, Any]
) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    mp.spawn(me_unet_ddp_worker.run, args=(2, name, port, compiled, options), nprocs=2)
