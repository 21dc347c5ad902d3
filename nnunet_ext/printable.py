"""Text that comes from elsewhere, made safe for a terminal: names, docstrings, errors and metadata of others."""

from __future__ import annotations

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


def counted(count: int, noun: str) -> str:
    """A number and what it counts: "1 case", "2 cases"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
