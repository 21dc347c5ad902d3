"""This machine: as many workers as trainings may run at once, each a job of submitit with GPUs of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nnunet_ext.cluster.job import Worker, living_workers, lock_of
from nnunet_ext.cluster.work import is_held
from nnunet_ext.errors import UsageError
from nnunet_ext.files import write_text, writing

_FOR_EVER = 60 * 24 * 365 * 10  # minutes: submitit ends local jobs after two, or what it is told
_STARTED = 60.0  # seconds for a worker to show that it lives


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """GPUs of this machine by what CUDA_VISIBLE_DEVICES calls them, those only that it names where it is set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def shared_out(gpus: Sequence[str], each: int, jobs: int | None) -> list[list[str]]:
    """GPUs of each worker.

    Args:
        gpus: Those of this machine.
        each: GPUs of a training; 0: none.
        jobs: Trainings at once; None: as many as there are GPUs for, one without GPUs.

    Raises:
        UsageError: there are fewer GPUs.
    """
    if each == 0:
        return [[] for _ in range(jobs or 1)]
    groups = [list(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)]
    if len(groups) < (jobs or 1):
        raise UsageError(
            f"--gpus {each}{f' --jobs {jobs}' if jobs else ''} needs {each * (jobs or 1)} GPUs, this machine shows "
            f"{len(gpus)}: give less, or --gpus 0 to train on the CPU."
        )
    return groups[:jobs]


def start(output: Path, groups: Sequence[Sequence[str]]) -> list[int]:
    """Start the workers that do not live yet, so that they outlive this terminal, and return their numbers.

    Args:
        output: Folder of the cross-validation.
        groups: GPUs of each.

    Raises:
        UsageError: one did not start.
    """
    living = living_workers(output)
    numbers = [number for number in range(len(groups)) if number not in living]
    for number in numbers:
        _start(output, number, groups)
    return numbers


def _start(output: Path, number: int, groups: Sequence[Sequence[str]]) -> None:
    log, each = output / "workers" / f"{number}.log", max(1, cores() // len(groups))
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        stream = log.open("ab")
    with stream:  # no pipe: what submitit starts keeps it
        command = [sys.executable, "-m", "nnunet_ext.cluster", str(output), str(number), str(each), *groups[number]]
        started = subprocess.run(
            command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, check=False
        )
    end = time.monotonic() + _STARTED
    while not started.returncode and time.monotonic() < end:
        if is_held(lock_of(output, number)) or _has_ended(output, number):
            return
        time.sleep(0.2)
    raise UsageError(f"worker {number} did not start, see {log} and {output / 'submitit'}: call again.")


def _has_ended(output: Path, number: int) -> bool:
    """Whether a worker has left its result already."""
    job = (output / "workers" / f"{number}.job").read_text(encoding="utf-8").strip()
    return (output / "submitit" / f"{job}_0_result.pkl").exists()


def submit(output: Path, number: int, each: int, gpus: Sequence[str]) -> None:
    """Start a worker through submitit; it ends with its work, not with this process.

    Args:
        output: Folder of the cross-validation.
        number: Number of the worker.
        each: CPU cores that it has.
        gpus: GPUs that it sees.
    """
    import submitit

    executor = submitit.AutoExecutor(output / "submitit", cluster="local")
    executor.update_parameters(timeout_min=_FOR_EVER, stderr_to_stdout=True)
    job = executor.submit(Worker(output, number, each, tuple(gpus)))
    write_text(output / "workers" / f"{number}.job", f"{job.job_id}\n")
