"""Tables of the report for a paper."""

from __future__ import annotations

from nnunet_ext.comparison.tables import Table
from nnunet_ext.escaping import latex


def table(content: Table) -> str:
    r"""A table for ``\input``, whose label is ``tab:`` and its name; the document needs ``\usepackage{booktabs}``."""
    columns = "l" * content.texts + "r" * (len(content.header) - content.texts)
    header, *rows = (f"{' & '.join(map(latex, row))} \\\\" for row in (content.header, *content.rows))
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex(content.caption)}}}",
            rf"\label{{tab:{content.name}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            header,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
