"""Two processes of one gloo group that run one job after the other: starting them takes longer than any of the jobs."""

from __future__ import annotations

import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 2
_LIMIT = 300  # seconds of a job


class Ranks:
    """The processes; they are started by the first job, and again after a job that failed.

    Args:
        joined: Whether they are one group; otherwise each job makes its own.
    """

    def __init__(self, joined: bool = True) -> None:
        self.joined = joined
        self._processes: list[Any] = []

    def run(self, job: Callable[..., None], *arguments: Any) -> None:
        """Run ``job(rank, *arguments)`` in both processes.

        Args:
            job: Function of a module.
            arguments: That can be pickled.

        Raises:
            AssertionError: it failed in one of them; the message holds its traceback.
        """
        if not self._processes:
            self._start()
        for jobs in self._jobs:
            jobs.put((job, arguments))
        for _ in range(SIZE):
            try:
                rank, failure = self._results.get(timeout=_LIMIT)
            except queue.Empty:
                rank, failure = "?", f"no rank has answered for {_LIMIT} s"
            if failure:
                self.close()  # the other one may wait for ever
                raise AssertionError(f"rank {rank}: {failure}")

    def close(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._results = context.Queue()
        self._jobs = [context.Queue() for _ in range(SIZE)]
        store = Path(tempfile.mkdtemp()) / "store" if self.joined else None
        for rank, jobs in enumerate(self._jobs):
            process = context.Process(target=_serve, args=(rank, store, jobs, self._results), daemon=True)
            process.start()
            self._processes.append(process)


def _serve(rank: int, store: Path | None, jobs: Any, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if store is not None:
        wait = timedelta(seconds=_LIMIT)
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=SIZE, timeout=wait)
    while True:
        job, arguments = jobs.get()
        torch._dynamo.reset()
        try:
            job(rank, *arguments)
            results.put((rank, ""))
        except BaseException:  # also of a job that ends its process
            results.put((rank, traceback.format_exc()))
