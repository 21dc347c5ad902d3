"""What became of a cell: it passed, the package says in a sentence that it does not do this, or it failed."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nnunet_ext.printable import one_line

Status = Literal["pass", "documented", "fail"]
OURS = "nnunet_ext."


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a cell.

    Args:
        status: "pass", "documented" (a NotImplementedError of this package that says what to use instead) or "fail".
        text: What was found, or the sentence of the error.
        seconds: How long it took.
    """

    status: Status
    text: str
    seconds: float = 0.0


class CheckError(Exception):
    """A command ended without an error, and what it left is wrong."""


def outcome_of(work: Callable[[], str]) -> Outcome:
    """Do the work of a cell, which returns what it found."""
    start = time.perf_counter()
    status: Status = "pass"
    try:
        text = work()
    except (Exception, SystemExit) as error:
        status, text = ("documented", one_line(error)) if is_documented(error) else ("fail", _said(error))
    return Outcome(status=status, text=text, seconds=round(time.perf_counter() - start, 2))


def is_documented(error: BaseException) -> bool:
    """Whether this package raised it, and its sentence goes on after a colon with what to use instead."""
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    raised_by = str(frames[-1].frame.f_globals.get("__name__")) if frames else ""
    rule, _, cure = str(error).partition(": ")
    return isinstance(error, NotImplementedError) and raised_by.startswith(OURS) and bool(rule and cure.strip())


def _said(error: BaseException) -> str:
    """Kind, text and place of an error; the place is the last one of this package, else the last."""
    if isinstance(error, CheckError):
        return one_line(error)
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    ours = [frame for frame in frames if str(frame.frame.f_globals.get("__name__")).startswith(OURS)]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*ours[-1:], *frames[-1:])]
    return f"{type(error).__name__} at {', '.join(dict.fromkeys(places))}: {one_line(error)}"
