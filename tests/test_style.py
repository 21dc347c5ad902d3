"""Rules of the code that neither ruff nor mypy checks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# Their calls are the rows of one table each, below the class.
TABLES = {"Tissue", "_Column"}


def dataclasses() -> Iterator[tuple[str, list[str]]]:
    """Name of each dataclass and the types of the fields that its calls may give by place."""
    for path in (path for part in ("nnunet_ext", "benchmarks") for path in (REPOSITORY / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                if any("dataclass" in text and "kw_only=True" not in text for text in decorators):
                    yield node.name, list(_by_place(node))


def _by_place(node: ast.ClassDef) -> Iterator[str]:
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            kind = ast.unparse(field.annotation)
            if kind == "KW_ONLY":
                return
            yield kind.removesuffix(" | None")


def test_dataclasses_with_neighbours_of_one_type_are_keyword_only() -> None:
    swappable = {name for name, kinds in dataclasses() if any(a == b for a, b in pairwise(kinds))}
    assert swappable == TABLES
