"""The record that every check of the doctor returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found.

    Args:
        level: "failure" where trainings would fail, "warning" where something may be meant otherwise.
        subject: What was checked.
        detail: What was found, in one line.
        cure: What to do about it, in one line; empty where nothing needs to be done.
    """

    level: Level
    subject: str
    detail: str
    cure: str = ""


def ok(subject: str, detail: str) -> Finding:
    """Return a finding that needs no cure."""
    return Finding(level="ok", subject=subject, detail=detail)


def warning(subject: str, detail: str, cure: str) -> Finding:
    """Return a finding that may be meant."""
    return Finding(level="warning", subject=subject, detail=detail, cure=cure)


def failure(subject: str, detail: str, cure: str) -> Finding:
    """Return a finding that has to be cured."""
    return Finding(level="failure", subject=subject, detail=detail, cure=cure)
