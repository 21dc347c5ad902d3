"""A job that fails on one rank fails its test, and the next job finds two ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Ranks


def add(rank: int, value: float) -> None:
    total = torch.tensor(value)
    dist.all_reduce(total)
    assert total == 2 * value


def fail_on_the_second(rank: int) -> None:
    if rank == 1:
        raise ValueError("as planned")
    add(rank, 1.0)  # waits for the other


def test_a_failure_is_told_and_the_next_job_runs(ranks: Ranks) -> None:
    ranks.run(add, 3.0)
    with pytest.raises(AssertionError, match=r"rank 1: [\s\S]*ValueError: as planned"):
        ranks.run(fail_on_the_second)
    ranks.run(add, 4.0)
