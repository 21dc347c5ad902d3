"""A switch that lets plain autograd keep everything: the reference of backward passes of own making."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class _Switch:
    now = False


@contextmanager
def everything_kept() -> Iterator[None]:
    """Let forward passes recompute nothing, and use no function of own making. Not for compiled passes."""
    before, _Switch.now = _Switch.now, True
    try:
        yield
    finally:
        _Switch.now = before


def is_everything_kept() -> bool:
    """Whether `everything_kept` is entered."""
    return _Switch.now
