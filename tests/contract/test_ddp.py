"""Every registered architecture under DistributedDataParallel, two gloo ranks, as nnU-Net wraps it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_ext import registry
from nnunet_ext.memory.network import surrogate_loss
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.protocols import only_predicts
from tests.contract import ddp_worker
from tests.ranks import Ranks
from tests.settings import tiny

TRAINERS = [name for name in registry.names("trainers") if not only_predicts(trainer_class(name))]


@pytest.mark.parametrize("name", registry.names("architectures"))
@pytest.mark.parametrize(
    ("compiled", "options"),
    [
        (False, {}),
        (False, {"find_unused_parameters": True}),
        (False, {"static_graph": True}),
        pytest.param(True, {}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_have_the_gradients_of_one_process(
    name: str, compiled: bool, options: dict[str, Any], ranks: Ranks
) -> None:
    ranks.run(ddp_worker.run, name, compiled, options)


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, of small buckets: PyTorch cuts compiled graphs at them there too."""
    torch._dynamo.reset()
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 2**12)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()


def gradients(network: nn.Module, wrapped: nn.Module, x: Tensor) -> Tensor:
    """Of all parameters of `network` in a row, from a pass through `wrapped` under autocast."""
    torch.manual_seed(0)  # of points, samples and dropout
    network.zero_grad()
    inputs = getattr(network, "training_inputs", lambda x: {})(x)
    with torch.autocast("cpu", dtype=torch.float16):
        outputs = wrapped(x, **inputs)
    (2**10 * surrogate_loss(outputs)).backward()  # as a gradient scaler does
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.slow
@pytest.mark.install
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", TRAINERS)
def test_compiled_in_many_buckets_and_float16_has_the_gradients_of_one_process(name: str) -> None:
    torch.manual_seed(0)
    network, x = tiny().builder(name)().train(), torch.randn(2, 1, 16, 16, 16)
    expected = gradients(network, network, x)
    wrapped = DistributedDataParallel(torch.compile(network, backend="aot_eager"), bucket_cap_mb=0.005)
    for _ in range(3):  # buckets are built anew after the first step
        found = gradients(network, wrapped, x)
        assert (found - expected).norm() <= 8 * torch.finfo(torch.float16).eps * expected.norm()
    assert wrapped._get_ddp_logging_data()["rebuilt_bucket_sizes"].count(",") >= 1
