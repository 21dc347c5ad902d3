"""Text that comes from elsewhere, made safe for a terminal: names, docstrings, errors and metadata of others."""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST_REASON = 300


def printable(text: str) -> str:
    r"""Write every character that is none to look at as its escape, e.g. "\x1b"; the result is one line.

    Control characters can move the cursor, retitle the window or hide what stands before them, those that set
    the direction of writing can show a name as another one, and halves of surrogate pairs can't be encoded.
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def printable_lines(text: str) -> str:
    """The same of a text whose lines are meant as lines, such as the end of a log."""
    return "\n".join(map(printable, text.split("\n")))


def one_line(error: BaseException) -> str:
    """What an exception says, on one line; its type where it says nothing."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 3]}..."


def typed_line(error: BaseException) -> str:
    """Type of an exception and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Names in a sentence: "a, b, c, d, e and 2 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def counted(count: int, noun: str) -> str:
    """A number and what it counts: "1 case", "2 cases"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
