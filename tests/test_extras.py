"""What is optional: commands that need it say so in one line, and nothing else imports it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from nnunet_ext import cli, extras
from nnunet_ext.errors import UsageError

PACKAGE = Path(extras.__file__).parent
# Where the extra may be imported: by the commands that ask for it first.
WITH_REPORTS = ("comparison", "demo", "style.py")


@pytest.mark.parametrize("command", ["compare", "benchmark", "demo"])
@pytest.mark.parametrize("missing", extras.MODULES["report"])
def test_command_without_its_extra_is_one_line_that_says_what_to_install(
    command: str, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main([command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{command} needs the extra [report] of this package, missing is {missing}: pip install " in line
    assert missing.replace("_", "-") in line.partition("pip install")[2]
    assert not list(tmp_path.iterdir())


def test_onnx_files_need_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"--onnx needs the extra \[onnx\] .* missing is onnxscript: pip install"):
        extras.need("onnx", "--onnx")


def imports(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_nothing_else_imports_what_reports_need() -> None:
    optional = set(extras.MODULES["report"])
    files = {path.relative_to(PACKAGE): imports(path) & optional for path in PACKAGE.rglob("*.py")}
    assert optional == set().union(*files.values())
    assert [str(path) for path, found in files.items() if found and path.parts[0] not in WITH_REPORTS] == []
