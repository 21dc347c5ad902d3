"""Slurm: submits the steps of a cross-validation through submitit, and asks what became of their jobs."""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnunet_ext.cluster.job import Means, StepJob
from nnunet_ext.cluster.request import CrossValidation
from nnunet_ext.cluster.states import State
from nnunet_ext.cluster.step import Step
from nnunet_ext.errors import UsageError

_ENDLESS = 10**6  # time limits that a job may reach: a training goes on as long as each brings it further
_PATIENCE = 60  # seconds for an answer of Slurm's commands
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


# States of jobs that have ended, or are ending.
_ENDING = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("REVOKED", "TIMEOUT"),
)
_OWN = {
    **{name: f"use --{name}" for name in ("partition", "time", "mem")},
    "cpus-per-task": "use --cpus",
    **dict.fromkeys(("mem-per-cpu", "mem-per-gpu"), "use --mem"),
    **dict.fromkeys(
        ("array", "dependency", "error", "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output"),
        "leave it out",
    ),
    **dict.fromkeys(("requeue", "signal"), "leave it out"),
}


class NoAnswerError(UsageError):
    """Slurm does not answer just now."""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What every job asks for.

    Args:
        partition: Name; None: the cluster's default.
        cpu_partition: That of steps without GPUs; None: the same.
        minutes: Time limit of a job; it may be shorter than a training.
        notice: Seconds before the limit at which a training is asked to save.
        memory: GiB.
        cpus: Cores.
        setup: Shell commands before it, such as "module load cuda".
        more: Further options of sbatch, by their long names; "" as value: it takes none.
    """

    partition: str | None
    cpu_partition: str | None
    minutes: int
    notice: int
    memory: float
    cpus: int
    setup: tuple[str, ...]
    more: Mapping[str, str]

    def check(self) -> None:
        """See that Slurm is here and knows the partition.

        Raises:
            UsageError: it is not, or it does not.
        """
        if shutil.which("sbatch") is None or shutil.which("squeue") is None:
            raise UsageError(
                "--executor slurm needs Slurm's commands, sbatch is not on PATH: call this on a login node of the "
                "cluster, or take --executor local."
            )
        partitions = [name.rstrip("*") for name in _ask(["sinfo", "--all", "--noheader", "--format=%P"]).split()]
        for name in ",".join(filter(None, (self.partition, self.cpu_partition))).split(","):
            if name and name not in partitions:
                raise UsageError(
                    f"--partition must be one of this cluster, got {name}: choose among {', '.join(partitions)}."
                )
        if taken := [name for name in self.more if name in _OWN]:
            raise UsageError(f"--slurm can't set {taken[0]}, which cv does: {_OWN[taken[0]]}.")

    def submit(self, asked: CrossValidation, step: Step, after: Sequence[str]) -> str:
        """Submit a step and return the number of its job.

        Args:
            asked: What it is part of.
            step: Step to do.
            after: Numbers of the jobs that must have ended before, well or not: the step looks itself.

        Raises:
            UsageError: Slurm refuses it.
        """
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = submitit.AutoExecutor(asked.output / "submitit", cluster="slurm", slurm_max_num_timeout=_ENDLESS)
        more = {name: value or True for name, value in self.more.items() if step.gpus or not _is_of_gpus(name)}
        gpus = {"gpus_per_node": step.gpus} if step.gpus and not any(map(_is_of_gpus, more)) else {}
        dependency = {"slurm_dependency": "afterany:" + ":".join(after)} if after else {}
        executor.update_parameters(
            name=f"cv {step.title}"[:80],
            timeout_min=self.minutes,
            mem_gb=self.memory,
            cpus_per_task=self.cpus,
            slurm_partition=self.partition if step.gpus else self.cpu_partition or self.partition,
            slurm_signal_delay_s=self.notice,
            slurm_setup=list(self.setup) or None,
            # From 22.05 on srun does not take the cores from sbatch.
            slurm_srun_args=[f"--cpus-per-task={self.cpus}"],
            slurm_additional_parameters={"requeue": True, **more},
            stderr_to_stdout=True,
            **gpus,
            **dependency,
        )
        means = Means(
            device=asked.device, gpus=asked.gpus, cores=self.cpus, limit=60.0 * self.minutes, notice=self.notice
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what submitit calls deprecated itself
                return str(executor.submit(StepJob(asked.output, step.name, means)).job_id)
        except (FailedJobError, FailedSubmissionError) as error:
            lines = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
            raise UsageError(
                f"Slurm refuses {step.title} ({lines[-1].strip()}): correct the options, or call again later."
            ) from error


def _is_of_gpus(option: str) -> bool:
    return option.startswith(("gpu", "gres"))


def minutes_of(text: str) -> int:
    """Minutes of a time as Slurm writes it: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS...

    Raises:
        UsageError: it is no time, or less than a minute.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise UsageError(f"--time must be a time as Slurm writes it, got {text}: give minutes, or 1-12:00:00.")
    parts = [int(match[name] or 0) for name in ("first", "second", "third")]
    if match["days"] is not None:
        minutes = int(match["days"]) * 1440 + parts[0] * 60 + parts[1]
    else:
        minutes = parts[0] * 60 + parts[1] if match["third"] is not None else parts[0]
    if minutes < 1:
        raise UsageError(f"--time must be at least a minute, got {text}: give minutes, or 1-12:00:00.")
    return minutes


def notice_of(minutes: int) -> int:
    """Seconds before a limit at which a training is asked to save: an epoch may be long, a short limit is not."""
    return min(600, minutes * 60 // 4)


def gibibytes_of(text: str) -> float:
    """GiB of a size as Slurm writes it, a number without a unit meaning GiB.

    Raises:
        UsageError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MGT]?)B?", text, flags=re.IGNORECASE)
    if match is None or not float(match[1]):
        raise UsageError(f"--mem must be a size, got {text}: give GiB, such as 32 or 32G.")
    return float(match[1]) * {"M": 1 / 1024, "": 1, "G": 1, "T": 1024}[match[2].upper()]


def queue() -> dict[str, tuple[str, str]] | None:
    """State and reason of each of the user's jobs, by number; None on a machine without Slurm's commands.

    Raises:
        NoAnswerError: it does not answer.
    """
    if shutil.which("squeue") is None:
        return None
    lines = _ask(["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%A|%T|%r"]).splitlines()
    parts = (line.split("|", 2) for line in lines if line.count("|") >= 2)
    return {job: (state, reason) for job, state, reason in parts}


def is_alive(queued: tuple[str, str] | None, said: State | None) -> bool:
    """Whether a job that stands in the queue will do its step, or does.

    Args:
        queued: Its state there and the reason; None: it does not stand there.
        said: What it said itself: a job that ends to begin again said so.
    """
    if queued is None:
        return False
    return queued[0] not in _ENDING or (said is not None and said.what == "requeued")


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs.

    Raises:
        UsageError: Slurm can't.
    """
    _ask(["scancel", *jobs])


def _ask(command: Sequence[str]) -> str:
    """Output of one of Slurm's commands.

    Raises:
        NoAnswerError: it failed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip() or str(error)
        raise NoAnswerError(f"Slurm does not answer {command[0]} ({reason}): is the cluster up?") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswerError(f"Slurm does not answer {command[0]} ({error}): is the cluster up?") from error
    return done.stdout
