"""This machine: as many workers as trainings may run at once, each a job of submitit with GPUs of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nnunet_ext.cluster.job import Means
from nnunet_ext.cluster.request import CrossValidation
from nnunet_ext.cluster.work import has_locks, is_held
from nnunet_ext.cluster.worker import Worker, living_workers, lock_of
from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json, write_text, writing

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


def check(asked: CrossValidation, groups: Sequence[Sequence[str]]) -> None:
    """See that workers can be started beside those that live.

    Args:
        asked: What they will work on.
        groups: GPUs of each.

    Raises:
        UsageError: those that live have other GPUs, or the file system has no locks.
    """
    for folder in (asked.output, asked.results):
        if not has_locks(folder):
            raise UsageError(
                f"workers need a file system with locks, {folder} has none: choose another by -o and nnUNet_results."
            )
    for number in living_workers(asked.output):
        theirs = read_json(_note(asked.output, number), "call `nnunet-ext cv stop`").get("arguments")
        if number < len(groups) and theirs != _arguments(asked, number, groups):
            raise UsageError(
                f"worker {number} lives with other GPUs, cores or device ({' '.join(theirs[1:] or '')}): call "
                "`nnunet-ext cv stop` first, or start with what it has."
            )


def start(asked: CrossValidation, groups: Sequence[Sequence[str]]) -> list[int]:
    """Start the workers that do not live yet, so that they outlive this terminal, and return their numbers.

    Args:
        asked: What they work on.
        groups: GPUs of each.

    Raises:
        UsageError: one did not start.
    """
    living = living_workers(asked.output)
    numbers = [number for number in range(len(groups)) if number not in living]
    for number in numbers:
        _start(asked.output, _arguments(asked, number, groups))
    return numbers


def _arguments(asked: CrossValidation, number: int, groups: Sequence[Sequence[str]]) -> list[str]:
    """Number, cores, device and GPUs of a worker."""
    return [str(number), str(max(1, cores() // len(groups))), asked.device, *groups[number]]


def _note(output: Path, number: int) -> Path:
    return output / "workers" / f"{number}.json"


def _start(output: Path, arguments: Sequence[str]) -> None:
    number = int(arguments[0])
    log = output / "workers" / f"{number}.log"
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        stream = log.open("ab")
    with stream:  # no pipe: what submitit starts keeps it
        command = [sys.executable, "-m", "nnunet_ext.cluster", str(output), *arguments]
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
    job = read_json(_note(output, number), "call again")["job"]
    return (output / "submitit" / f"{job}_0_result.pkl").exists()


def submit(output: Path, arguments: Sequence[str]) -> None:
    """Start a worker through submitit; it ends with its work, not with this process.

    Args:
        output: Folder of the cross-validation.
        arguments: Its number, cores, device and GPUs.
    """
    import submitit

    number, each, device, *gpus = arguments
    means = Means(device=device, gpus=len(gpus), cores=int(each), variables={"CUDA_VISIBLE_DEVICES": ",".join(gpus)})
    executor = submitit.AutoExecutor(output / "submitit", cluster="local")
    executor.update_parameters(timeout_min=_FOR_EVER, stderr_to_stdout=True)
    job = executor.submit(Worker(output, int(number), means))
    write_text(_note(output, int(number)), json.dumps({"job": job.job_id, "arguments": [*arguments]}) + "\n")
