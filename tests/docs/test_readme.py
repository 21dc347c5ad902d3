"""The README's table is what the committed benchmark has measured, for every trainer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nnunet_ext import registry
from nnunet_ext.protocols import only_predicts

REPOSITORY = Path(__file__).parents[2]
BENCHMARK = REPOSITORY / "docs" / "benchmarks" / "2026-11-27-methods" / "benchmark.json"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_table", REPOSITORY / "benchmarks" / "methods_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(BENCHMARK.read_text(encoding="utf-8"))
    return content


def test_table_is_what_was_measured(script: ModuleType, benchmark: dict[str, Any]) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert script.inserted(readme, benchmark) == readme


def test_every_trainer_that_trains_has_a_row(script: ModuleType, benchmark: dict[str, Any]) -> None:
    trained = [name for name in registry.names("trainers") if not only_predicts(registry.resolve("trainers", name))]
    table = script.table(benchmark)
    assert [name for name in trained if f"| `{name}` |" not in table] == []


def test_every_planner_stands_in_a_row(script: ModuleType, benchmark: dict[str, Any]) -> None:
    table = script.table(benchmark)
    assert [name for name in registry.names("planners") if f"`{name}`" not in table] == []


def test_what_is_not_measured_is_a_dash(script: ModuleType) -> None:
    methods = [
        {"trainer": "nnUNetTrainer", "network": "A", "ratios": {"parameters": 1.0, "peak_bytes": 1.0}},
        {"trainer": "nnUNetTrainerX", "network": "B", "ratios": {"parameters": 1 / 3, "peak_bytes": None}},
    ]
    header, _, _, row = script.table({"methods": methods}).splitlines()
    assert header == "| trainer | network | planner | parameters | memory peak |"
    assert row == "| `nnUNetTrainerX` | `B` | – | 0.33× | – |"  # noqa: RUF001


def test_a_readme_without_markers_is_refused(script: ModuleType, benchmark: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs one <!-- methods:begin -->"):
        script.inserted("# nnunet-ext", benchmark)
