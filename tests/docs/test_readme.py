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

DASH = "\N{EN DASH}"
REPOSITORY = Path(__file__).parents[2]
BENCHMARK = max(REPOSITORY.glob("docs/benchmarks/*-methods/benchmark.json"))  # of the latest date


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
    assert script.inserted(readme, benchmark, BENCHMARK.parent.relative_to(REPOSITORY).as_posix()) == readme


def test_every_trainer_that_trains_has_a_row(script: ModuleType, benchmark: dict[str, Any]) -> None:
    trained = [name for name in registry.names("trainers") if not only_predicts(registry.resolve("trainers", name))]
    table = script.table(benchmark)
    assert [name for name in trained if f"| `{name}` |" not in table] == []


def test_every_planner_stands_in_a_row(script: ModuleType, benchmark: dict[str, Any]) -> None:
    table = script.table(benchmark)
    assert [name for name in registry.names("planners") if f"`{name}`" not in table] == []


def test_every_method_of_this_package_says_what_it_is_for(script: ModuleType, benchmark: dict[str, Any]) -> None:
    methods = benchmark["methods"]
    trainers = [method for method in methods[1:] if method["trainer"] in registry.names("trainers")]
    assert [m["trainer"] for m in trainers if script.purpose(m, methods) == script.MISSING] == []


def method(trainer: str, **ratios: float | None) -> dict[str, Any]:
    return {"trainer": trainer, "network": "Net", "ratios": {"parameters": 0.5, **ratios}}


CHECKPOINTING = method("nnUNetTrainerActivationCheckpointing", peak_bytes=0.47)
FOLDED = method("nnUNetTrainerHalfWidthBN", parameters_deployed=0.25, macs=0.25)


def test_rivals_follow_the_default_and_what_is_not_known_is_a_dash(script: ModuleType) -> None:
    budget = {**method("nnUNetTrainer", held_bytes=0.57), "budget": 0.5}
    others = [method("nnUNetTrainerReversible", peak_bytes=1 / 3), CHECKPOINTING, budget]
    rows = script.table({"methods": [method("nnUNetTrainer", peak_bytes=1.0, held_bytes=1.0), *others]}).splitlines()
    assert rows[0] == "| trainer | network | planner | for | held | peak | weights |"
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        "`nnUNetTrainer`",
        "`nnUNetTrainerActivationCheckpointing`",
        "`nnUNetTrainer`, compiled with a memory budget of 0.5",
        "`nnUNetTrainerReversible`",
    ]
    cells = [[cell.strip(" \N{MULTIPLICATION SIGN}") for cell in row.split("|")[3:-1]] for row in rows[4:]]
    assert cells == [
        [DASH, "rival", "0.57", DASH, "0.50"],
        ["`ReversibleUNetDeepPlanner`, `ReversibleUNetPlanner`", "memory of training", DASH, "0.33", "0.50"],
    ]


@pytest.mark.parametrize(
    ("trainer", "ratios", "expected"),
    [
        ("nnUNetTrainerReversible", {"peak_bytes": 0.68}, "memory of training; **behind checkpointing**"),
        ("nnUNetTrainerReversible", {"peak_bytes": 0.47}, "memory of training"),
        ("nnUNetTrainerMeReversible", {"peak_bytes": None}, "memory of training"),
        (
            "nnUNetTrainerFasterFusion",
            {"parameters_deployed": 0.29, "macs": 0.9},
            "small and fast in prediction; **behind half width, norm folded**",
        ),
        (
            "nnUNetTrainerFasterFusion",
            {"parameters_deployed": 0.22, "macs": 0.9},
            "small and fast in prediction; **behind half width, norm folded** in operations",
        ),
        ("nnUNetTrainerFasterFusion", {"parameters_deployed": 0.22, "macs": 0.19}, "small and fast in prediction"),
        ("nnUNetTrainerHalfWidthBN", {"macs": 0.9}, "rival"),
        ("nnUNetTrainerOfOthers", {"peak_bytes": 2.0}, DASH),
    ],
)
def test_row_says_where_it_is_behind_a_rival_in_what_it_is_for(
    trainer: str, ratios: dict[str, float | None], expected: str, script: ModuleType
) -> None:
    assert script.purpose(method(trainer, **ratios), [CHECKPOINTING, FOLDED]) == expected


def test_a_readme_without_markers_is_refused(script: ModuleType, benchmark: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs one <!-- methods:begin -->"):
        script.inserted("# nnunet-ext", benchmark, "docs")
