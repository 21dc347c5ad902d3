"""The tables of README and of the methods' page are what aims and the committed benchmark say, for every trainer."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nnunet_ext import aims, registry
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


@pytest.fixture(scope="module")
def readme() -> str:
    return (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_tables_are_what_was_measured(script: ModuleType, benchmark: dict[str, Any]) -> None:
    folder = f"../benchmarks/{BENCHMARK.parent.name}"
    for page, text in script.pages(benchmark, folder).items():
        assert page.read_text(encoding="utf-8") == text


def test_readme_is_short_and_its_tables_too(readme: str) -> None:
    assert len(readme.splitlines()) <= 120
    tables = re.findall(r"(?:^\|.*\n)+", readme, flags=re.MULTILINE)
    assert tables
    assert max(table.count("\n") for table in tables) <= 12  # ten rows


def test_readme_quotes_accuracy_only_beside_its_schedule(readme: str) -> None:
    before, _, rest = readme.partition("<!-- results:begin -->")
    readme = before + rest.partition("<!-- results:end -->")[2]
    quoted = re.findall(r"[^.\n]*\b(?:Dice|NSD|HD95|IoU|accura\w+)\b[^.\n]*", readme)
    assert [sentence for sentence in quoted if re.search(r"\d+[.]\d+|[+-]\d|\d %", sentence)] == []


def test_readme_names_one_page_for_each_job(readme: str) -> None:
    _, _, jobs = readme.partition("## Your job")
    jobs = jobs.partition("\n## ")[0]
    found = re.findall(r"^\*\*.+\*\* \(\[(.+?)\]\((.+?)\)\)", jobs, flags=re.MULTILINE)
    assert [text for text, target in found if text != target] == []
    pages = ("advise", "deploy", "compare", "cluster", "install", "add-a-method")
    assert [target for _, target in found] == [f"docs/how-to/{page}.md" for page in pages]


def test_half_width_stands_beside_faster_fusion() -> None:
    for page in ("README.md", "docs/methods/faster_fusion.md", "docs/how-to/deploy.md"):
        text = " ".join((REPOSITORY / page).read_text(encoding="utf-8").split())
        for words in ("nnUNetTrainerHalfWidthBN", "nnUNetTrainerFasterFusionBN", "compared at convergence"):
            assert words in text, page


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/how-to/{page}.md" for page in ("install", "deploy", "demo", "cluster", "scale"))]
)
def test_commands_are_those_that_exist(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL))
    for command, rest in re.findall(r"^(?:\S*/)?nnunet-ext ([\w-]+)(.*)$", blocks, flags=re.MULTILINE):
        module = importlib.import_module(f"nnunet_ext.cli.{command.replace('-', '_')}")
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        parser.parse_args(shlex.split(rest, comments=True))
    named = {*re.findall(r"-tr (\w+)", blocks), *re.findall(r"-pl (\w+)", blocks)} - {"nnUNetTrainerX"}
    for name in named - {"nnUNetTrainer"}:
        kind = "trainers" if "Trainer" in name else "planners"
        base = registry.parse_schedule(name).base if registry.parse_schedule(name) else name  # type: ignore[union-attr]
        assert base in {aims.DEFAULT, *registry.names(kind)}, name
    plans = {plans for planner in registry.names("planners") if (plans := plans_of(planner))} | {"nnUNetPlans"}
    assert {*re.findall(r" -p (nnUNet\w+)", blocks)} <= plans


def plans_of(planner: str) -> str:
    return next(registry.planned(entry)[1] for entry in registry.entries("planners") if entry.name == planner)


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


def test_recommended_and_rivals_follow_the_default_and_what_is_not_known_is_a_dash(script: ModuleType) -> None:
    budget = {**method("nnUNetTrainer", held_bytes=0.57), "budget": 0.5}
    others = [method("nnUNetTrainerReversible", peak_bytes=1 / 3), budget, CHECKPOINTING]
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
        ["`ReversibleUNetDeepPlanner`, `ReversibleUNetPlanner`", "memory, context", DASH, "0.33", "0.50"],
    ]


@pytest.mark.parametrize(
    ("trainer", "ratios", "expected"),
    [
        ("nnUNetTrainerReversible", {"peak_bytes": 0.68}, "memory, context; behind ActivationCheckpointing"),
        ("nnUNetTrainerReversible", {"peak_bytes": 0.474}, "memory, context"),  # the same two digits
        ("nnUNetTrainerMeReversible", {"peak_bytes": None}, "context, memory"),
        ("nnUNetTrainerActivationCheckpointing", {"peak_bytes": 0.9}, "**context**, **memory**: recommended"),
        (
            "nnUNetTrainerFasterFusion",
            {"parameters_deployed": 0.29, "macs": 0.9},
            "size, speed: research; behind HalfWidthBN",
        ),
        (
            "nnUNetTrainerFasterFusionBN",
            {"parameters_deployed": 0.22, "macs": 0.9},
            "size, speed; behind HalfWidthBN in operations",
        ),
        ("nnUNetTrainerFasterFusionBN", {"parameters_deployed": 0.22, "macs": 0.19}, "size, speed"),
        ("nnUNetTrainerHalfWidth", {"macs": 0.25}, "size, speed: rival"),
        ("nnUNetTrainerOfOthers", {"peak_bytes": 2.0}, DASH),
    ],
)
def test_row_says_where_it_is_behind_the_recommended_trainer(
    trainer: str, ratios: dict[str, float | None], expected: str, script: ModuleType
) -> None:
    assert script.purpose(method(trainer, **ratios), [CHECKPOINTING, FOLDED]) == expected


def test_a_page_without_markers_is_refused(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="needs one <!-- methods:begin -->"):
        script.inserted("# nnunet-ext", "methods", "text")


def test_figure_shows_what_was_counted(benchmark: dict[str, Any]) -> None:
    figure = (REPOSITORY / "docs" / "methods" / "methods.svg").read_text(encoding="utf-8")
    drawn = [method for method in aims.METHODS if method.standing != "research"]
    by_trainer = {found["trainer"]: found for found in benchmark["methods"] if not found.get("budget")}
    for method in drawn:
        figures = by_trainer[method.trainer]
        texts = [method.trainer.removeprefix(aims.DEFAULT) or "default nnU-Net"]
        texts += [f"{figures['peak_bytes'] / 2**30:.3g}", f"{figures['macs'] / 1e9:.3g}"]
        texts += [f"{figures['parameters_deployed'] / 1e6:.3g}"]
        assert [text for text in texts if f">{text}<" not in figure] == [], method.trainer
