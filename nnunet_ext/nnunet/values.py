"""Checks of single values in plans.json and dataset.json: both come from other people."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any


def is_plain_name(value: Any) -> bool:
    """Whether a value can be the name of a file or folder, and no path to another place."""
    return isinstance(value, str) and value.isprintable() and not re.fullmatch(r"|\.\.?|.*[/\\].*", value)


def shown(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def is_int(value: Any, smallest: int = 0) -> bool:
    """Whether a value is a whole number of at least `smallest`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= smallest


def is_list_of(value: Any, is_right: Callable[[Any], bool]) -> bool:
    """Whether a value holds nothing but what is right."""
    is_listed = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
    return is_listed and all(is_right(item) for item in value)
