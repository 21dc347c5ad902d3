"""No verdict where the data carry none: planted reports, each with one fault, and the sound one beside them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ext.comparison import compare, json_content, selection, tables
from nnunet_ext.comparison.compare import Comparison
from nnunet_ext.comparison.selection import Selection
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.training_log import log_of, read_log, record
from tests.comparison.conftest import (
    DATASET,
    FULL,
    Counts,
    Folds,
    MakeRun,
    Schedule,
    dice_counts,
    first_line,
    random_folds,
    write_fold,
)

A, B = "nnUNetTrainer", "nnUNetTrainerB"
JULY = 1_784_000_000.0  # 2026-07-14


def run(*folders: Path, **options: Any) -> Comparison:
    return compare.compare(
        selection.request(Selection(**{"folders": folders, "processes": 1, "margin": 1.0} | options))
    )


def words(found: Comparison) -> set[str | None]:
    """Words of all verdicts that a report of this would hold."""
    content = json_content.as_json(found)
    return {d["verdict"] for e in content["evaluations"] for d in e["differences"]}


def shifted(folds: Folds, by: float) -> Folds:
    return {
        fold: {case: [dice_counts(c[0] / 1000 + by) for c in counts] for case, counts in cases.items()}
        for fold, cases in folds.items()
    }


def like(folds: Folds, counts: list[Counts]) -> Folds:
    """The same cases, all with these counts."""
    return {fold: dict.fromkeys(cases, counts) for fold, cases in folds.items()}


def pair(make_run: MakeRun, *, baseline: dict[str, Any] | None = None, **other: Any) -> tuple[Path, Path]:
    """Two full trainings, the second 3 points better, and what is different in either."""
    folds = random_folds(1)
    first = {"folds": folds, "schedule": FULL} | (baseline or {})
    second = {"folds": shifted(folds, 0.03), "schedule": FULL} | other
    return make_run(A, **first), make_run(B, **second)


def test_sound_comparison_has_verdicts(make_run: MakeRun) -> None:
    found = run(*pair(make_run))
    assert words(found) == {"superior", None}  # None: of IoU
    assert first_line(found) == "All checks hold. Verdicts by the margin of 1 Dice point that --margin gives."


PLANTED: dict[str, tuple[dict[str, Any], str]] = {
    "unlearned baseline": (
        {"baseline": {"folds": shifted(random_folds(1), -0.45)}},
        "a baseline must reach a mean Dice of 0.5 (nnUNetTrainer: 0.2",
    ),
    "short schedules": (
        {"baseline": {"schedule": replace(FULL, epochs=99)}, "schedule": replace(FULL, epochs=99)},
        "at least 10% of nnU-Net's 250,000 iterations (nnUNetTrainer: 9.9 %; nnUNetTrainerB: 9.9 %)",
    ),
    "unequal schedules": (
        {"schedule": replace(FULL, epochs=500)},
        "runs must have equal iterations (nnUNetTrainer: 250,000; nnUNetTrainerB: 125,000)",
    ),
    "rising curve": (
        {"schedule": replace(FULL, rise=0.0002)},
        "learning curves must have flattened (nnUNetTrainerB: +2.0 Dice points)",
    ),
    "few epochs": (
        {"schedule": replace(FULL, epochs=10, iterations=25_000)},
        "learning curves must have flattened (nnUNetTrainerB: fewer than 20 epochs)",
    ),
    "other voxels": (
        {"batch_size": 4},
        "equal voxels in an iteration (nnUNetTrainer: 8,192 (2 of 16x16x16); nnUNetTrainerB: 16,384 (4 of 16x16x16))",
    ),
    "other folds": ({"folds": {"0": random_folds(1)["0"]}}, "the same folds (nnUNetTrainer: 0 1; nnUNetTrainerB: 0)"),
    "other augmentation": (
        {"schedule": replace(FULL, augmentation="0.3.4")},
        "(nnUNetTrainer: before 0.3.4, by date; nnUNetTrainerB: 0.3.4)",
    ),
    "collapsed curve": (
        {"schedule": replace(FULL, rise=-0.0002)},
        "learning curves must have flattened (nnUNetTrainerB: \N{MINUS SIGN}2.0 Dice points)",
    ),
    "other references": (
        {"folds": like(random_folds(1), [(900, 300, 600)] * 2)},
        "runs must have the same data set, splits and references",
    ),
    "swapped splits": (
        {"folds": dict(zip(("1", "0"), shifted(random_folds(1), 0.03).values(), strict=True))},
        "runs must have the same data set, splits and references",
    ),
    "structure that the baseline has not learned": (
        {
            "baseline": {
                "folds": {
                    f: {c: [(980, 20, 20), (50, 950, 950)] for c in cases} for f, cases in random_folds(1).items()
                }
            }
        },
        "cross-validation, nnUNetTrainerB: nnUNetTrainer has a Dice of 0.050 in lesion",
    ),
    "run with Dice near zero": (
        {"folds": like(random_folds(1), [(2, 998, 998)] * 2)},
        "cross-validation, nnUNetTrainerB: nnUNetTrainerB has a Dice of 0.002 in ",
    ),
    "run that never finds a structure": (
        {"folds": {f: {c: [n[0], (0, 0, 1000)] for c, n in cases.items()} for f, cases in random_folds(1).items()}},
        "cross-validation, nnUNetTrainerB: nnUNetTrainerB never finds lesion",
    ),
    "two cases": (
        {
            "baseline": {"folds": {"0": {c: [dice_counts(0.7)] * 2 for c in "ab"}}},
            "folds": {"0": {c: [dice_counts(0.8)] * 2 for c in "ab"}},
        },
        "cross-validation, nnUNetTrainerB: 2 of the 10 cases that it takes",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_leaves_no_verdict_and_the_first_line_says_why(make_run: MakeRun, fault: str) -> None:
    changes, reason = PLANTED[fault]
    found = run(*pair(make_run, **changes))
    assert words(found) == {None}
    assert first_line(found).startswith("No verdict: ")
    assert reason in first_line(found)


def test_without_a_margin_there_are_intervals_alone(make_run: MakeRun) -> None:
    found = run(*pair(make_run), margin=None)
    assert words(found) == {None}
    assert first_line(found) == "No verdict: no margin was chosen (--margin)."
    assert found.evaluations[0].comparand(B).difference.low > 0


def test_unfinished_training_fails_the_schedule(make_run: MakeRun) -> None:
    a, b = pair(make_run)
    debug = json.loads((b / "fold_1" / "debug.json").read_text())
    (b / "fold_1" / "debug.json").write_text(json.dumps({**debug, "num_epochs": "1500"}))
    assert "(nnUNetTrainerB: 100 %, unfinished)" in first_line(run(a, b))


def test_folds_of_unequal_lengths_are_not_equal_in_sum(make_run: MakeRun) -> None:
    a, b = pair(make_run)
    for fold in (a / "fold_0", b / "fold_1"):
        shutil.rmtree(fold)
    cases = random_folds(1)
    write_fold(a / "fold_0", cases["0"], replace(FULL, epochs=500))
    write_fold(b / "fold_1", cases["1"], replace(FULL, epochs=500))
    assert "runs must have equal iterations" in first_line(run(a, b))


@pytest.mark.parametrize("change", ["another checkpoint", "validated twice"])
def test_validation_that_may_be_of_another_checkpoint_has_no_verdict(make_run: MakeRun, change: str) -> None:
    a, b = pair(make_run)
    for fold in b.glob("fold_*"):
        if change == "validated twice":
            lines = "Mean Validation Dice:  0.61\nMean Validation Dice:  0.63\n"
            (fold / "training_log_1.txt").write_text(lines)
        else:
            (fold / "checkpoint_final.pth").rename(fold / "checkpoint_best.pth")
    found = run(a, b)
    assert words(found) == {None}
    assert "validations must be of the final checkpoint (nnUNetTrainerB: perhaps another)" in first_line(found)


def test_fold_all_has_no_verdict(make_run: MakeRun) -> None:
    folds = {"all": random_folds(1)["0"] | random_folds(1)["1"]}
    found = run(*pair(make_run, baseline={"folds": folds}, folds=shifted(folds, 0.03)), folds=["all"])
    assert words(found) == {None}
    assert "which hold their cases back (nnUNetTrainer: all; nnUNetTrainerB: all)" in first_line(found)


@pytest.mark.parametrize("epochs", [None, "0", "many"])
def test_unknown_number_of_planned_epochs_fails_the_schedule(make_run: MakeRun, epochs: str | None) -> None:
    a, b = pair(make_run)
    for fold in b.glob("fold_*"):
        debug = json.loads((fold / "debug.json").read_text()) | {"num_epochs": epochs}
        (fold / "debug.json").write_text(json.dumps(debug))
    assert "(nnUNetTrainerB: 100 %, of unknown epochs)" in first_line(run(a, b))


def test_edited_dice_has_no_verdict(make_run: MakeRun) -> None:
    a, b = pair(make_run)
    path = b / "fold_0" / "validation" / "summary.json"
    content = json.loads(path.read_text())
    content["metric_per_case"][2]["metrics"]["1"]["Dice"] = 0.99
    path.write_text(json.dumps(content))
    found = run(a, b)
    assert words(found) == {None}
    assert "nnUNetTrainerB: Dataset007_Toy, edited Dice" in first_line(found)


def test_diverged_training_counts_as_failed(make_run: MakeRun) -> None:
    found = run(*pair(make_run, schedule=replace(FULL, rise=float("nan"))))
    assert words(found) == {None}


def test_trainings_of_which_nothing_is_known_have_no_verdict(make_run: MakeRun) -> None:
    a, b = pair(make_run)
    for path in b.glob("fold_*/checkpoint_final.pth"):
        path.unlink()
    found = run(a, b)
    assert words(found) == {None}
    assert "the trainings must be known" in first_line(found)


def test_structure_that_neither_run_finds_has_no_verdict(make_run: MakeRun) -> None:
    missed = {f: {c: [n[0], (0, 0, 1000)] for c, n in cases.items()} for f, cases in random_folds(1).items()}
    made = pair(
        make_run,
        baseline={"folds": missed},
        folds={f: {c: [n[0], (0, 0, 1000)] for c, n in cs.items()} for f, cs in shifted(random_folds(1), 0.03).items()},
    )
    found = run(*made, accepted=("baseline",))
    evaluation = found.evaluations[0]
    judged = {s: found.gate.judge(evaluation, evaluation.comparand(B, structure=s)) for s in ("organ", "lesion")}
    assert [str(v) for v in judged.values()] == ["superior", "\N{EN DASH} (found by neither)"]


def test_one_bad_run_leaves_the_verdict_on_the_others(make_run: MakeRun) -> None:
    short = make_run("nnUNetTrainerC", random_folds(1), schedule=replace(FULL, epochs=50))
    found = run(*pair(make_run), short)
    verdicts = {
        c.run: str(found.gate.judge(found.evaluations[0], c))
        for c in found.evaluations[0].comparands
        if c.metric == "Dice" and c.structure is None
    }
    assert verdicts == {B: "superior", "nnUNetTrainerC": "\N{EN DASH}"}
    line = first_line(found)
    assert line.startswith("Verdicts by the margin of 1 Dice point that --margin gives. Not on all: ")
    assert "nnUNetTrainerC: 5 %" in line


def test_accepted_fault_is_said_in_the_first_line(make_run: MakeRun) -> None:
    folders = pair(make_run, batch_size=4)
    found = run(*folders, accepted=("voxels",))
    assert "superior" in words(found)
    assert "Accepted by --accept: runs must see equal voxels in an iteration (" in first_line(found)
    with pytest.raises(UsageError, match=r"--accept must be of trainings, checkpoint, .*, got all: correct it"):
        run(*folders, accepted=("all",))


@pytest.mark.parametrize(
    ("version", "started", "same"),
    [("0.3.6", 10.0, True), (None, JULY, True), (None, 10.0, False), ("0.3.3", JULY, False)],
)
def test_augmentation_is_known_by_its_version_or_else_by_its_date(
    make_run: MakeRun, version: str | None, started: float, same: bool
) -> None:
    newer = replace(FULL, augmentation="0.3.4")
    other = replace(FULL, augmentation=version, started=started)
    found = run(*pair(make_run, baseline={"schedule": newer}, schedule=other))
    assert ("augmentation must be the same" not in first_line(found)) == same


def test_res_enc_m_is_the_second_baseline_where_it_lies_beside_the_runs(make_run: MakeRun, tmp_path: Path) -> None:
    pair(make_run)
    chosen = {"folders": (), "dataset": "7", "trainers": (A, B), "results": tmp_path / "results"}
    assert run(**chosen).request.second is None
    make_run(A, random_folds(3), plans="nnUNetResEncUNetMPlans", schedule=FULL)
    found = run(**chosen)
    assert found.evaluations[0].labels == (A, B, "ResEnc M")
    assert found.evaluations[0].comparand(B, baseline="ResEnc M").difference.n == 12
    content = json_content.as_json(found)
    assert content["second_baseline"] == "ResEnc M"
    table = next(t for t in (tables.second(found, found.evaluations[0]),) if t is not None)
    assert [row[:2] for row in table.rows] == [("Dice", B)]
    alone = run(*(tmp_path / "results" / "Dataset007_Toy" / f"{name}__nnUNetPlans__3d_fullres" for name in (A, B)))
    assert found.evaluations[0].comparand(B).p_holm == alone.evaluations[0].comparand(B).p_holm
    assert run(**chosen, baseline="ResEnc M").evaluations[0].labels[0] == "ResEnc M"
    assert run(**chosen, names=("ResEnc M", B)).request.second == "nnUNetResEncUNetMPlans"


@pytest.mark.parametrize("fault", ["cut off", "fewer cases"])
def test_res_enc_m_that_does_not_fit_is_left_out(make_run: MakeRun, tmp_path: Path, fault: str) -> None:
    pair(make_run)
    folds = (
        random_folds(3) if fault == "cut off" else {f: dict(list(c.items())[:3]) for f, c in random_folds(3).items()}
    )
    folder = make_run(A, folds, plans="nnUNetResEncUNetMPlans", schedule=FULL)
    if fault == "cut off":
        (folder / "fold_0" / "validation" / "summary.json").write_text("{")
    found = run(folders=(), dataset="7", trainers=(A, B), results=tmp_path / "results")
    assert found.evaluations[0].labels == (A, B)
    assert len(found.evaluations[0].cases) == 12


def test_constant_curves_are_flat_and_noise_is_not_a_rise() -> None:
    from nnunet_ext.comparison.gate import RISE, _rise
    from nnunet_ext.comparison.training import Training
    from nnunet_ext.nnunet.training_log import Curves, TrainingLog

    random = np.random.default_rng(0)
    dice = tuple(0.8 + 0.02 * random.standard_normal(1000))
    curves = Curves(training_loss=dice, validation_loss=dice, dice=dice, seconds=dice)
    log = TrainingLog(curves=curves, epochs=1000, iterations=250, machine="", augmentation=None)
    assert abs(_rise(Training({"0": log}))) < RISE
    short = replace(log, curves=replace(curves, dice=dice[:19]))
    assert not np.isfinite(_rise(Training({"0": short})))


def test_default_schedule_of_the_fixture_is_too_short() -> None:
    assert Schedule().epochs * Schedule().iterations < 0.1 * 250_000


def deploy(trained: Path, folder: Path, records: dict[str, Any] | None = None) -> Path:
    """A folder such as `nnunet-ext deploy` makes of a training, without weights."""
    plans = json.loads((trained / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["deployed"] = {"trainer": A, "form": "hybrid", "dtype": "float16"}
    for fold in ("0", "1"):
        (folder / f"fold_{fold}").mkdir(parents=True)
        (folder / f"fold_{fold}" / "checkpoint_final.pth").touch()
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text((trained / "dataset.json").read_text())
    if records is None:
        records = {f: {"training": record(read_log(trained / f"fold_{f}")[0])} for f in ("0", "1")}
    (folder / "deployment.json").write_text(json.dumps({"folds": records}, allow_nan=False))
    return folder


def segmentations(folder: Path, cut: int) -> Path:
    """Twelve cases of two boxes, of which the first `cut` slices are not found."""
    folder.mkdir()
    for i in range(12):
        labels = np.zeros((10, 12, 12), dtype=np.uint8)
        labels[cut:8, 2:6, 2 : 6 + i % 3] = 1
        labels[cut:9, 8:11, 2:8] = 2
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(folder / f"c{i}.nii.gz"))
    return folder


def test_deployed_model_is_judged_by_the_training_that_it_came_from(make_run: MakeRun, tmp_path: Path) -> None:
    trained = make_run(A, random_folds(1), schedule=FULL)
    shipped = deploy(trained, tmp_path / "shipped")
    truth, found = segmentations(tmp_path / "truth", 0), segmentations(tmp_path / "found", 2)
    chosen = {"predictions": (found, found), "references": truth}
    same = run(trained, shipped, **chosen)
    assert same.evaluations[0].labels == (A, f"{A}, deployed float16")
    assert words(same) == {"non-inferior", None}
    assert same.costs[f"{A}, deployed float16"].peak is None
    with pytest.raises(UsageError, match=r"a deployed model has no validation, got .*shipped: predict held-out scans"):
        run(trained, shipped)
    unknown = run(trained, deploy(trained, tmp_path / "old", {"0": {"dtype": "float16"}}), **chosen)
    assert words(unknown) == {None}
    assert "the trainings must be known" in first_line(unknown)


def test_predictions_alone_have_no_verdict(tmp_path: Path) -> None:
    truth, found = segmentations(tmp_path / "truth", 0), segmentations(tmp_path / "found", 2)
    other = segmentations(tmp_path / "other", 1)
    (found / "dataset.json").write_text(json.dumps(DATASET))
    judged = run(folders=(), predictions=(found, other), references=truth)
    assert words(judged) == {None}
    assert first_line(judged).startswith("No verdict: the trainings must be known")
    assert words(run(folders=(), predictions=(found, other), references=truth, accepted=("trainings",))) == {
        "superior",
        None,
    }


def test_record_of_a_training_comes_back_from_json(make_run: MakeRun) -> None:
    trained = make_run(A, random_folds(1), schedule=replace(FULL, augmentation="0.3.6"))
    log, _ = read_log(trained / "fold_0")
    assert log.curves is not None
    log = replace(log, curves=replace(log.curves, dice=(float("nan"), *log.curves.dice[1:])))
    again = log_of(json.loads(json.dumps(record(log), allow_nan=False)))
    assert repr(again) == repr(log)  # NaN is not equal to itself
    odd = log_of({**record(log), "epochs": "9", "augmentation": 3})
    assert odd is not None
    assert (odd.epochs, odd.augmentation) == (9, None)


@pytest.mark.parametrize(
    "broken",
    ["text", {"curves": {}}, {"epochs": 3}, {"dice": 3}, {"seconds": None}, {"started": "x"}, {"training_loss": None}],
)
def test_record_that_is_none_is_not_known(make_run: MakeRun, broken: Any) -> None:
    whole = record(read_log(make_run(A, random_folds(1)) / "fold_0")[0])
    if isinstance(broken, dict) and broken.keys() <= whole["curves"].keys():
        broken = {**whole, "curves": whole["curves"] | broken}
    assert log_of(broken) is None


def test_dates_that_are_none_are_unknown(make_run: MakeRun) -> None:
    folder = make_run(A, random_folds(1), schedule=replace(FULL, epochs=2, started=1e20))
    assert read_log(folder / "fold_0")[0].is_turned is None
