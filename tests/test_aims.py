"""The table of aims: every trainer of this package, one recommendation per aim, figures as measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nnunet_ext import aims, registry
from nnunet_ext.protocols import only_predicts

RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks"


def record(path: str) -> Any:
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


def test_every_trainer_of_this_package_that_trains_has_an_aim() -> None:
    ours = [entry for entry in registry.entries("trainers") if entry.value.startswith("nnunet_ext.")]
    trained = {entry.name for entry in ours if not only_predicts(registry.resolve("trainers", entry.name))}
    assert {method.trainer for method in aims.METHODS} == {aims.DEFAULT, *trained}
    assert len(aims.BY_TRAINER) == len(aims.METHODS)


@pytest.mark.parametrize("aim", aims.AIMS)
def test_one_trainer_is_recommended_for_an_aim_and_stands_first(aim: aims.Aim) -> None:
    assert [method for method in aims.METHODS if aim in method.recommended] == [aims.recommended(aim)]
    assert all(method.recommended.keys() <= set(method.aims) for method in aims.METHODS)


@pytest.mark.parametrize("aim", aims.AIMS)
def test_research_switches_stand_last_and_are_never_recommended(aim: aims.Aim) -> None:
    standings = [method.standing for method in aims.serving(aim)]
    assert standings == [*(s for s in standings if s != "research"), *(s for s in standings if s == "research")]
    assert aims.recommended(aim).standing != "research"


def test_planners_are_shared_only_with_trainers_that_have_some() -> None:
    planned_for = {registry.resolve("planners", name).trainer for name in registry.names("planners")}
    sharing = [method for method in aims.METHODS if method.plans_of]
    assert [method.trainer for method in sharing if method.plans_of not in planned_for] == []
    assert [method.trainer for method in sharing if method.trainer in planned_for] == []


def test_figures_of_the_reasons_are_those_measured() -> None:
    methods = {method["trainer"]: method["ratios"] for method in record("2026-11-29-methods/benchmark.json")["methods"]}
    counted = [
        methods["nnUNetTrainerActivationCheckpointing"]["peak_bytes"],
        *(methods["nnUNetTrainerHalfWidthBN"][key] for key in ("parameters_deployed", "peak_bytes")),
        *(methods["nnUNetTrainerFasterFusionBN"][key] for key in ("parameters_deployed", "macs", "peak_bytes")),
    ]
    times = record("2026-11-21-faster-fusion/faster-fusion-cpu.json")["networks at 128^3, float32"]
    faster = {row["name"]: row["faster"] for row in times}
    small = ("half width, batch norm folded", "FasterFusionFast", "FasterFusionBN")
    steps = {row["trainer"]: row["step_ms"] for row in record("2026-11-27-gpu/gpu.json")["rows"] if not row["compiled"]}
    slower = steps["nnUNetTrainerActivationCheckpointing"] / steps[aims.DEFAULT]
    known = {f"{n:.2f}x" for n in [*counted, *(faster[name] for name in small)]} | {f"{slower:.1f}x"}
    quoted = {found for m in aims.METHODS for why in m.recommended.values() for found in re.findall(r"[\d.]+x", why)}
    assert quoted == known


def test_no_method_ahead_of_the_recommended_one_in_speed_is_passed_over() -> None:
    rows = record("2026-11-21-faster-fusion/faster-fusion-cpu.json")["networks at 128^3, float32"]
    assert max(rows, key=lambda row: row["faster"])["name"] == "half width, batch norm folded"
    assert aims.recommended("speed").trainer == "nnUNetTrainerHalfWidthBN"
