"""Tables and findings on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from nnunet_ext.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

    from nnunet_ext.doctor.finding import Finding


def print_table(console: Console, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table whose first column holds names, the others numbers; text means nothing to rich."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for index, cell in enumerate(header):
        table.add_column(Text(cell), justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print()
    console.print(title, markup=False, highlight=False)
    console.print(table)


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
