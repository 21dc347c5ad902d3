"""The recommendation follows the figures of the table, whatever the names in it are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nnunet_ext import aims
from nnunet_ext.advise import measured, text
from nnunet_ext.advise.choice import choose, reasons
from nnunet_ext.advise.records import Advice, Row
from nnunet_ext.errors import UsageError
from nnunet_ext.memory.tracker import GIB

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks"


def row(trainer: str, planner: str = "", patch: int = 100, gb: float = 6.0, **changes: Any) -> Row:
    found = Row(
        trainer=trainer,
        planner=planner or f"{trainer}Planner",
        plans=f"{trainer}Plans",
        patch=(patch,) * 3,
        batch=2,
        image=(200,) * 3,
        expected=round(gb * GIB),
        parameters=30_000_000,
        parameters_deployed=30_000_000,
        step_operations=1000,
        case_operations=1000,
        case_voxels=1000,
    )
    return replace(found, **changes)


DEFAULT = row(aims.DEFAULT, "ExperimentPlanner", has_own_weights=True)
OWN = row("Own", patch=130, has_own_weights=True, step_operations=2000)


def advice(aim: aims.Aim, *rows: Row, target: float = 8.0) -> Advice:
    return Advice(
        dataset="Dataset004_Acme",
        number="4",
        configuration="3d_fullres",
        target=target,
        gpu="--gpu",
        aim=aim,
        rows=[DEFAULT, *rows],
    )


def taken(aim: aims.Aim, *rows: Row, target: float = 8.0) -> tuple[str, str]:
    """Trainer that is recommended, and the reasons."""
    found = advice(aim, *rows, target=target)
    choice = choose(found)
    return choice.row.trainer, " ".join(reasons(found, choice))


def test_the_largest_patch_is_taken_for_context_and_the_best_own_network_named() -> None:
    trainer, why = taken("context", OWN, row("New", patch=180))
    assert trainer == "New"
    assert "covers 72.9% of a typical image with a patch; default nnU-Net covers 12.5% of a typical image" in why
    assert "has not been shown" in why
    assert "Of nnU-Net's own networks the best here is Own with OwnPlanner: it covers 27.5%" in why


def test_an_own_network_is_left_only_for_one_that_is_twice_as_good() -> None:
    trainer, why = taken("context", OWN, row("New", patch=134))
    assert trainer == "Own"
    assert "accuracy is published" in why
    assert "has not been shown" not in why  # not better by a tenth
    trainer, why = taken("context", OWN, row("New", patch=160))
    assert trainer == "Own"
    assert "New with NewPlanner covers 51.2% of a typical image with a patch, but its accuracy" in why


def test_default_is_kept_where_only_an_unproven_network_is_better() -> None:
    trainer, why = taken("context", row("Own", patch=101, has_own_weights=True), row("New", patch=120))
    assert trainer == aims.DEFAULT
    assert why.startswith("No network of known accuracy is better by a tenth: Own with OwnPlanner covers 12.9%")
    assert "New with NewPlanner covers 21.6% of a typical image with a patch, but its accuracy" in why


def test_of_own_networks_as_good_the_one_of_the_fewest_operations_is_taken() -> None:
    filled = row("Filled", patch=128, has_own_weights=True)
    assert taken("context", OWN, filled)[0] == "Filled"


@pytest.mark.parametrize("aim", aims.AIMS)
def test_stays_with_default_where_nothing_is_a_tenth_better(aim: aims.Aim) -> None:
    close = row("Close", patch=102, gb=5.5, has_own_weights=True, parameters_deployed=28_000_000, case_operations=930)
    trainer, why = taken(aim, close)
    assert trainer == aims.DEFAULT
    assert why.startswith("Nothing is better by a tenth: Close with ClosePlanner ")


def test_stays_with_default_whose_patch_covers_the_image() -> None:
    whole = [replace(found, image=(100,) * 3) for found in (DEFAULT, OWN, row("New", patch=160))]
    found = replace(advice("context"), rows=whole)
    assert choose(found).row.is_default
    assert text.verdict(choose(found)) == "Stay with default nnU-Net."
    (why,) = reasons(found, choose(found))
    assert why.startswith("Its patch covers a typical image already")


def test_default_that_does_not_fit_is_left() -> None:
    trainer, why = taken("context", row("New", patch=90, gb=3), target=4)
    assert trainer == "New"
    assert "12.5% of a typical image with a patch, which needs 6.0 GB and does not fit" in why


def test_the_least_memory_is_taken_but_of_meunets_smaller_patch() -> None:
    small = row("Small", gb=2, standard_patch=(64,) * 3)
    assert taken("memory", row("Lean", gb=3), row("Fat", gb=4), small)[0] == "Lean"
    assert taken("memory", row("Lean", gb=3), row("Own", gb=3.5, has_own_weights=True))[0] == "Own"


def test_of_equally_small_networks_the_faster_is_taken_and_measured_times_count() -> None:
    slim = {"parameters_deployed": 7_000_000, "case_operations": 100}
    half = row("nnUNetTrainerHalfWidthBN", **{**slim, "parameters_deployed": 7_800_000, "case_operations": 250})
    assert taken("size", row("New", **slim), half)[0] == "New"
    fusion = row("nnUNetTrainerFasterFusionBN", **slim)  # measured slower than its operations let expect
    trainer, why = taken("size", fusion, half)
    assert trainer == "nnUNetTrainerHalfWidthBN"
    assert "ships 7.80 M weights; default nnU-Net ships 30.00 M" in why
    trainer, why = taken("speed", fusion, half)
    assert trainer == "nnUNetTrainerHalfWidthBN"
    assert "0.22 times the time of default nnU-Net, measured on a CPU. " in why


def test_times_measured_of_other_networks_are_not_shown() -> None:
    half, expanded = "nnUNetTrainerHalfWidthBN", "nnUNetTrainerMeUNet"
    assert advice("speed").prediction(row(half, case_voxels=2000)) == (pytest.approx(2 * 0.216), True)
    assert advice("speed").prediction(row(half, case_operations=250, is_plain=False)) == (0.25, False)
    assert row(expanded, standard_patch=(64,) * 3).measured_step == measured.STEP[expanded]
    assert row(expanded).measured_step is None  # then it is nnU-Net's own step
    assert row("nnUNetTrainerReversible", is_plain=False).measured_step is None


def test_research_switches_are_never_recommended() -> None:
    assert taken("size", row("nnUNetTrainerFasterFusionFast", parameters_deployed=1))[0] == aims.DEFAULT


@pytest.mark.parametrize("rows", [[], [Row(trainer="A", planner="B", reason="no patch")]])
def test_a_card_too_small_for_all_is_one_sentence(rows: Sequence[Row]) -> None:
    with pytest.raises(UsageError, match=r"no method trains 3d_fullres .* in 3 GB, the least is 6\.0 GB .*: enlarge"):
        choose(advice("context", *rows, target=3))


def test_commands_overwrite_nothing_and_belong_together() -> None:
    found = advice("context", OWN)
    assert [" ".join(parts) for parts in text.Commands(found, OWN)] == [
        "nnUNetv2_plan_experiment -d 4 -pl OwnPlanner -gpu_memory_target 8 -overwrite_plans_name OwnPlans_8G",
        "nnUNetv2_preprocess -d 4 -plans_name OwnPlans_8G -c 3d_fullres",
        "nnUNetv2_train 4 3d_fullres 0 -p OwnPlans_8G -tr Own",
        "nnUNetv2_predict -i IN -o OUT -f 0 -d 4 -c 3d_fullres -p OwnPlans_8G -tr Own",
    ]
    cascade = [" ".join(parts) for parts in text.Commands(found, row("nnUNetTrainerMeCascade"))]
    assert "nnUNetv2_train 4 3d_me_context 0" in cascade[2]
    assert "nnUNetv2_train 4 3d_post_concat 0" in cascade[3]
    assert cascade[4].startswith("nnunet-ext cascade-predict")


def test_measured_times_are_those_of_the_committed_results() -> None:
    rows = json.loads((RESULTS / "2026-11-27-gpu" / "gpu.json").read_text(encoding="utf-8"))["rows"]
    steps = {r["trainer"]: r["step_ms"] / rows[0]["step_ms"] for r in rows if not r["compiled"]}
    assert rows[0]["trainer"] == aims.DEFAULT
    assert {name: pytest.approx(steps[name], abs=0.01) for name in steps if name != aims.DEFAULT} == measured.STEP
    path = RESULTS / "2026-11-21-faster-fusion" / "faster-fusion-cpu.json"
    faster = {r["name"]: r["faster"] for r in json.loads(path.read_text())["networks at 128^3, float32"]}
    names = {"HalfWidth": "half width", "HalfWidthBN": "half width, batch norm folded"}
    for trainer, time in measured.PREDICTION.items():
        name = trainer.removeprefix("nnUNetTrainer")
        assert time == pytest.approx(1 / faster[names.get(name, name)], abs=0.001)
