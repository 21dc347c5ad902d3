"""Names of other people's files, made safe for where they are shown: one function for each kind of document.

Structures, cases, runs and plans are called whatever somebody called them; to a document a name may be a heading, a
tag, a formula or mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from nnunet_ext.printable import printable, printable_lines

# An underscore inside a word emphasises nothing, "<" alone is no tag, "&" alone no entity: they stay readable.
_MARKUP = re.compile(r"[\\`*\[\]|$~]|(?<![^\W_])_|_(?![^\W_])")
_HTML = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")
_FIRST = re.compile(r"^(\s*)([-+=#:>])|^(\s*\d+)([.)])(?=\s|$)")  # what begins a list, a heading, a quotation
_FORMULA = "=+-@\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}\N{FULLWIDTH COMMERCIAL AT}"
# What LaTeX reads as commands, what its fonts of text lack, and what it takes as an option where a row begins.
_LATEX = {
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
    **{sign: rf"\text{name}{{}}" for sign, name in (("\\", "backslash"), ("~", "asciitilde"), ("^", "asciicircum"))},
    **{sign: rf"\text{name}{{}}" for sign, name in (("<", "less"), (">", "greater"), ("|", "bar"))},
    **{sign: f"{{{sign}}}" for sign in "[]*"},
    "`": r"\textasciigrave{}",
    '"': r"\char34{}",  # which babel makes a command
    "\N{MINUS SIGN}": "$-$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{EN DASH}": r"\textendash{}",
}
_SHORT = 40  # characters in a figure


def markdown(text: str) -> str:
    """One line of Markdown that shows `text`, whatever stands in it: a paragraph, an item, a heading."""
    return _FIRST.sub(lambda match: f"{match[1] or match[3] or ''}&#{ord(match[2] or match[4])};", markdown_cell(text))


def markdown_cell(text: str) -> str:
    """Cell of a table in Markdown that shows `text`, whatever stands in it."""
    escaped = _MARKUP.sub(r"\\\g<0>", printable(text))
    return _HTML.sub(lambda match: f"&#{ord(match[0])};", escaped)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Table in Markdown of cells that are Markdown already."""
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code_block(text: str) -> str:
    """Lines of a shell as a block of Markdown, whose fence is longer than any in them."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}bash\n{printable_lines(text)}\n{fence}"


def html(text: str) -> str:
    """Text of a page, or of an attribute between quotes; lines stay lines."""
    return escape(printable_lines(text))


def latex(text: str) -> str:
    """Text of a LaTeX document, or of a cell of its tables; letters beyond the Latin ones ask for LuaLaTeX."""
    shown = "".join(_LATEX.get(char, char) for char in printable(text))
    return re.sub("([-',])(?=\\1)", r"\1{}", shown)  # else joined to one sign


def csv_cell(text: str) -> str:
    """A cell of a CSV file that no spreadsheet takes for a formula: it then begins with an apostrophe."""
    cell = printable(text)
    return f"'{cell}" if cell.lstrip()[:1] in (*_FORMULA, "'") else cell


def drawn(text: str, among: Iterable[str] = ()) -> str:
    """A name in a figure: one line, and no "_" at the start, which matplotlib's legends leave out.

    It is shortened, unless another name `among` those shown with it would then look the same.
    """
    line = _shortened(text)
    if any(_shortened(other) == line for other in among if other != text):
        line = printable(text)
    return f" {line}" if line.startswith("_") else line


def _shortened(text: str) -> str:
    line, half = printable(text), _SHORT // 2
    return line if len(line) <= _SHORT else f"{line[: half - 1]}\N{HORIZONTAL ELLIPSIS}{line[-half:]}"
