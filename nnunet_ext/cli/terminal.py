"""Text, tables and findings on the terminal, no line wider than it is, no word broken."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, TextIO

from nnunet_ext.printable import printable

if TYPE_CHECKING:
    from nnunet_ext.doctor.finding import Finding

_GAP = 2  # columns between two of a table


def width() -> int:
    """Columns of the terminal; 80 where the output is no terminal, or what COLUMNS says."""
    return shutil.get_terminal_size((80, 24)).columns


def whole_words(text: str, most: int, first: str = "", further: str = "") -> list[str]:
    """Lines of a paragraph; a word or name that is longer than a line stands out of it.

    Args:
        text: Of one paragraph.
        most: Columns of a line.
        first: What the first line begins with.
        further: What the others begin with.
    """
    return textwrap.wrap(
        text, most, initial_indent=first, subsequent_indent=further, break_long_words=False, break_on_hyphens=False
    )


def wrapped(text: str, indent: int = 0) -> list[str]:
    """Lines of a paragraph as wide as the terminal, made safe to print; none of no text."""
    return whole_words(printable(text), width(), " " * indent, " " * indent)


@contextmanager
def status_line(stream: TextIO) -> Iterator[Callable[[str], None]]:
    """Give a function that shows a line on a terminal until the next, or an empty one; elsewhere nothing."""

    def show(text: str) -> None:
        if stream.isatty():
            print(f"\r\x1b[K{printable(text)[: width() - 1]}", end="", file=stream, flush=True)

    try:
        yield show
    finally:
        show("")


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table whose first column holds names, the others figures, which may have several lines.

    Columns that find no place beside the names follow below, next to the names again.
    """
    table = [[*header], *map(list, rows)]
    names = [line[0] for line in table]
    least = _longest(" ".join(names).split())
    sizes = [max(_longest(first.split()), _longest(rest)) for first, *rest in zip(*table, strict=True)][1:]
    print(f"\n{title}")
    for columns in _parts(sizes, width() - least):
        left = width() - sum(sizes[column] + _GAP for column in columns)
        widths = [max(least, min(_longest(names), left)), *(sizes[column] for column in columns)]
        lines = [_row([line[0], *(line[column + 1] for column in columns)], widths) for line in table]
        lines.insert(1, ["-" * (sum(widths) + _GAP * len(columns))])
        print("\n".join(["", *(text for line in lines for text in line)]))


def _parts(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers of the columns that stand side by side beside the names, at least one."""
    part: list[int] = []
    for column, size in enumerate(sizes):
        if part and sum(sizes[i] + _GAP for i in part) + _GAP + size > most:
            yield part
            part = []
        part.append(column)
    yield part


def _row(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Lines of a row."""
    texts = [
        [line for text in cell.split("\n") for line in whole_words(text, size)]
        for cell, size in zip(cells, widths, strict=True)
    ]
    rows = zip_longest(*texts, fillvalue="")
    gap = " " * _GAP
    return [gap.join([name.ljust(widths[0]), *map(str.rjust, figures, widths[1:])]).rstrip() for name, *figures in rows]


def _longest(texts: Iterable[str]) -> int:
    """Columns of the longest line."""
    return max((len(line) for text in texts for line in text.split("\n")), default=0)


def row(finding: Finding, width: int) -> str:
    """One line for a finding, its cure below it; the subject fills `width` characters."""
    level = finding.level.upper() if finding.level == "failure" else finding.level
    lines = [f"{level:<7}  {finding.subject:<{width}}  {finding.detail}"]
    lines += [f"{'':<7}  {'':<{width}}  -> {finding.cure}"] if finding.cure else []
    return "\n".join(map(printable, lines))


def counts(findings: Sequence[Finding]) -> str:
    """How many are failures and warnings."""
    found = {level: sum(finding.level == level for finding in findings) for level in ("failure", "warning")}
    return f"failures: {found['failure']}, warnings: {found['warning']}"
