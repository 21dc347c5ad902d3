"""What the jobs say of their steps: one small file for each, written whole."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json, write_text

What = Literal["running", "requeued", "stopped", "failed", "done"]
STOP = "stop"  # file in the output folder that asks all running steps to end


@dataclass(frozen=True, kw_only=True)
class State:
    """What a job said last.

    Args:
        what: What became of the step.
        message: Why it failed, in one line.
        host: Machine that it ran on.
    """

    what: What
    message: str = ""
    host: str = field(default_factory=socket.gethostname)


def write_state(output: Path, step: str, state: State) -> None:
    """Say what became of a step.

    Raises:
        UsageError: it can't be written.
    """
    write_text(_file(output, step), json.dumps(asdict(state), indent=2) + "\n")


def read_state(output: Path, step: str) -> State | None:
    """What its job said last; None where none has said anything."""
    path = _file(output, step)
    if not path.is_file():
        return None
    try:
        return State(**read_json(path, "call again"))
    except (UsageError, TypeError):
        return None


def forget(output: Path, step: str) -> None:
    """Let a step that failed be done again."""
    _file(output, step).unlink(missing_ok=True)


def write_job(output: Path, step: str, job: str) -> None:
    """Keep the number of the Slurm job that does a step."""
    write_text(output / "jobs" / f"{step}.txt", job + "\n")


def read_job(output: Path, step: str) -> str | None:
    """Number of the Slurm job that does a step; None where none was submitted."""
    return _number(output / "jobs" / f"{step}.txt")


def all_jobs(output: Path) -> list[str]:
    """Numbers of all Slurm jobs that were submitted, also of steps that the plans have no more."""
    numbers = map(_number, (output / "jobs").glob("*.txt"))
    return sorted({number for number in numbers if number is not None})


def _number(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return text if text.isdecimal() else None


def _file(output: Path, step: str) -> Path:
    return output / "states" / f"{step}.json"


def log_of(output: Path, step: str) -> Path:
    """Log of the commands of a step."""
    return output / "logs" / f"{step}.log"
