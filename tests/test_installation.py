"""Install lines name where this copy came from, and no project that others could register."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nnunet_ext import installation

REPOSITORY = Path(__file__).parents[1]


def install_from(monkeypatch: pytest.MonkeyPatch, record: Any, requires: list[str] | None = None) -> None:
    text = None if record is None else json.dumps(record)
    installed = SimpleNamespace(read_text=lambda name: text, requires=requires)
    monkeypatch.setattr(installation, "distribution", lambda name: installed)


@pytest.mark.parametrize(
    ("record", "argument"),
    [
        ({"url": "file://{}", "dir_info": {"editable": True}}, "-e {}"),
        ({"url": "file://{}", "dir_info": {}}, "{}"),
        ({"url": "file://{}", "archive_info": {}}, "{}"),
        ({"url": "https://host/r.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "git+https://host/r.git@abc"),
        ({"url": "https://host/nnunet_ext-1-py3-none-any.whl", "archive_info": {}}, None),
        ({"url": "file:///gone/nnunet_ext-1-py3-none-any.whl", "archive_info": {}}, installation.UNKNOWN),
        ({"dir_info": {}}, installation.UNKNOWN),
        ([], installation.UNKNOWN),
        (None, installation.UNKNOWN),
    ],
)
def test_origin_is_what_pip_wrote_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record: Any, argument: str | None
) -> None:
    if isinstance(record, dict) and "url" in record:
        record = {**record, "url": record["url"].format(tmp_path)}
    expected = record["url"] if argument is None else argument.format(tmp_path)
    install_from(monkeypatch, record)
    assert installation.origin() == expected
    assert installation.reinstall() == f"pip install --force-reinstall --no-deps {expected}"


def test_path_with_spaces_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    install_from(monkeypatch, {"url": folder.as_uri(), "dir_info": {"editable": True}})
    assert installation.origin() == f"-e '{folder}'"


def test_extra_is_its_own_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = [
        "torch>=2.5",
        "onnx>=1.17; extra == 'onnx'",
        'onnxruntime>=1.20 ; extra == "onnx"',
        "x; extra=='on'",
        "y; python_version < '3' and extra == 'onnx'",
        "z; 'onnx' == extra",
    ]
    install_from(monkeypatch, None, requires)
    assert installation.extra("onnx", ("fallback",)) == "pip install 'onnx>=1.17' 'onnxruntime>=1.20' z"


def test_copy_without_metadata_names_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(installation, "distribution", missing)
    assert installation.origin() == installation.UNKNOWN
    assert installation.extra("onnx", ("onnx", "onnxruntime")) == "pip install onnx onnxruntime"


def test_requirements_of_the_onnx_extra_are_found_in_the_metadata_of_this_copy() -> None:
    line = installation.extra("onnx", ())
    assert sorted(re.findall(r"[\w.]+(?=>=)", line)) == ["onnx", "onnxruntime", "onnxscript"]


def test_no_line_of_code_or_documentation_installs_the_name_of_the_project() -> None:
    folders = ("nnunet_ext", "docs", "benchmarks")
    pages = [REPOSITORY / "README.md", REPOSITORY / "_nnunet_ext_hook.py"]
    pages += [path for name in folders for path in (REPOSITORY / name).rglob("*") if path.suffix in {".py", ".md"}]
    line = re.compile(r"(pip|uv|conda|poetry)\b[^\n`]*\b(install|add)\b[^\n`]*nnunet[-_]ext(?![-_\w/.])")
    found = [f"{page}: {match[0]}" for page in pages for match in line.finditer(page.read_text(encoding="utf-8"))]
    assert found == []
