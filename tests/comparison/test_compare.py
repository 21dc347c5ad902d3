"""A comparison of runs: means, differences and doubts, against values computed here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from nnunet_ext.comparison import compare, selection, tables
from nnunet_ext.comparison.accuracy import MEAN
from nnunet_ext.comparison.compare import Comparison
from nnunet_ext.comparison.selection import Selection
from nnunet_ext.errors import UsageError
from nnunet_ext.memory.count import training_memory
from nnunet_ext.nnunet.setting import Setting
from tests.comparison.conftest import FULL, Folds, MakeRun, dice_counts, first_line, random_folds


def run(*folders: Path, **options: Any) -> Comparison:
    return compare.compare(selection.request(Selection(folders=folders, processes=1, **options)))


def dice(folds: Folds) -> np.ndarray:
    """Dice of all cases in order, (case, structure)."""
    return np.array([[c[0] / 1000 for c in counts] for cases in folds.values() for counts in cases.values()])


def test_means_differences_and_p_values_are_those_of_an_independent_computation(make_run: MakeRun) -> None:
    folds = [random_folds(1), random_folds(2, 0.03), random_folds(3, -0.05)]
    names = ["nnUNetTrainer", "nnUNetTrainerB", "nnUNetTrainerC"]
    found = run(*(make_run(name, f) for name, f in zip(names, folds, strict=True)))
    (evaluation,) = found.evaluations
    values = [dice(f) for f in folds]
    raw_p = []
    for name, own in zip(names, values, strict=True):
        assert evaluation.mean(name).mean == pytest.approx(own.mean())
        assert evaluation.mean(name, structure="lesion").mean == pytest.approx(own[:, 1].mean())
        assert evaluation.mean(name, structure="organ").standard_deviation == pytest.approx(own[:, 0].std(ddof=1))
    for name, own in zip(names[1:], values[1:], strict=True):
        d = own.mean(axis=1) - values[0].mean(axis=1)
        c = evaluation.comparand(name)
        assert c.difference.mean == pytest.approx(d.mean())
        assert c.difference.p == pytest.approx(stats.wilcoxon(d).pvalue)
        expected = stats.ttest_rel(own.mean(axis=1), values[0].mean(axis=1)).confidence_interval(0.95)
        assert (c.difference.low, c.difference.high) == pytest.approx((expected.low, expected.high))
        raw_p.append(c.difference.p)
    low, high = sorted(raw_p)
    adjusted = sorted(evaluation.comparand(name).p_holm for name in names[1:])
    assert adjusted == pytest.approx([min(1, 2 * low), min(1, max(2 * low, high))])


def test_holm_family_of_single_structures_is_all_runs_and_structures(make_run: MakeRun) -> None:
    found = run(*(make_run(f"nnUNetTrainer{i}", random_folds(i, 0.02 * i)) for i in range(3))).evaluations[0]
    pairs = [found.comparand(f"nnUNetTrainer{i}", "Dice", s) for i in (1, 2) for s in ("organ", "lesion")]
    smallest = min(pairs, key=lambda c: c.difference.p)
    assert smallest.p_holm == pytest.approx(min(1, 4 * smallest.difference.p))


def test_verdicts_follow_the_margin(make_run: MakeRun) -> None:
    base = {"0": {f"c{i}": [dice_counts(0.5 + 0.01 * i)] * 2 for i in range(12)}}
    lower = {"0": {f"c{i}": [dice_counts(0.495 + 0.01 * i)] * 2 for i in range(12)}}
    folders = [make_run(f"nnUNetTrainer{x}", cases, schedule=FULL) for x, cases in (("", base), ("B", lower))]
    for margin, verdict in ((1.0, "non-inferior (less, by less than the margin)"), (0.4, "inferior")):
        found = run(*folders, margin=margin)
        evaluation = found.evaluations[0]
        assert str(found.gate.judge(evaluation, evaluation.comparand("nnUNetTrainerB"))) == verdict


def test_baseline_comes_first_and_can_be_chosen(make_run: MakeRun) -> None:
    folders = [make_run(name, random_folds(i)) for i, name in enumerate(("nnUNetTrainer", "nnUNetTrainerB"))]
    found = run(*folders, baseline="nnUNetTrainerB")
    assert found.evaluations[0].labels == ("nnUNetTrainerB", "nnUNetTrainer")
    assert list(found.costs) == ["nnUNetTrainerB", "nnUNetTrainer"]
    with pytest.raises(UsageError, match="--baseline needs one of nnUNetTrainer; nnUNetTrainerB, got X"):
        run(*folders, baseline="X")


def test_worst_cases_are_the_lowest_means(make_run: MakeRun) -> None:
    folds = random_folds(4)
    found = run(make_run("nnUNetTrainer", folds), make_run("nnUNetTrainerB", random_folds(5)))
    means = dict(zip([c for f in folds.values() for c in f], dice(folds).mean(axis=1), strict=True))
    assert [case for case, _ in found.evaluations[0].worst["nnUNetTrainer"]] == sorted(means, key=means.__getitem__)[:5]


def test_only_common_cases_are_compared_and_the_others_are_named(make_run: MakeRun) -> None:
    folds = random_folds(1)
    short = {"0": folds["0"], "1": dict(list(folds["1"].items())[1:])}
    found = run(make_run("nnUNetTrainer", folds), make_run("nnUNetTrainerB", short))
    assert len(found.evaluations[0].cases) == 11
    assert any(
        "left out, because another run lacks them: 1 of 12 cases" in w and "case_06" in w for w in found.warnings
    )
    assert found.evaluations[0].mean("nnUNetTrainer").mean == pytest.approx(np.delete(dice(folds), 6, axis=0).mean())


def test_missing_fold_is_warned_of(make_run: MakeRun) -> None:
    folds = random_folds(1)
    found = run(make_run("nnUNetTrainer", folds), make_run("nnUNetTrainerB", {"0": folds["0"]}))
    assert "runs must have the same folds (nnUNetTrainer: 0 1; nnUNetTrainerB: 0)" in first_line(found)
    assert len(found.evaluations[0].cases) == 6


def test_runs_without_common_cases_are_refused(make_run: MakeRun) -> None:
    folds = random_folds(1)
    with pytest.raises(UsageError, match=r"must have cases of cross-validation in common, .*nnUNetTrainer: 6 cases"):
        run(make_run("nnUNetTrainer", {"0": folds["0"]}), make_run("nnUNetTrainerB", {"1": folds["1"]}))


def test_different_splits_and_references_are_warned_of(make_run: MakeRun) -> None:
    folds = random_folds(1)
    other = {"0": folds["1"], "1": dict(folds["0"])}
    other["1"]["case_00"] = [(500, 0, 400), other["1"]["case_00"][1]]  # 900 voxels instead of 1000
    warnings = run(make_run("nnUNetTrainer", folds), make_run("nnUNetTrainerB", other)).warnings
    assert any("In different folds of different runs, whose splits thus differ: 12 cases" in w for w in warnings)
    assert any("references of 1 case differ" in w and "case_00" in w for w in warnings)


def test_absent_structure_leaves_the_run_that_rightly_finds_nothing_out(make_run: MakeRun) -> None:
    folds = random_folds(1)
    right, wrong = ({"0": {**folds["0"], "x": [dice_counts(0.5), c]}} for c in ((0, 0, 0), (0, 9, 0)))
    found = run(make_run("nnUNetTrainer", right), make_run("nnUNetTrainerB", wrong))
    a, b = (found.evaluations[0].mean(name, structure="lesion") for name in ("nnUNetTrainer", "nnUNetTrainerB"))
    assert (a.n, a.invented, b.n, b.invented) == (6, 0, 7, 1)
    assert found.evaluations[0].comparand("nnUNetTrainerB", structure="lesion").difference.n == 6
    assert any("nnUNetTrainerB: finds lesion in 1 case without it" in w for w in found.warnings)


def test_different_epochs_machines_and_batches_are_warned_of(make_run: MakeRun) -> None:
    a, b = (make_run("nnUNetTrainer", random_folds(1)), make_run("nnUNetTrainerB", random_folds(1), batch_size=4))
    debug = {"num_epochs": "9", "num_iterations_per_epoch": "25", "gpu_name": "Other", "torch_version": "2.9"}
    (b / "fold_0" / "debug.json").write_text(json.dumps(debug))
    found = run(a, b)
    warnings = "\n".join(found.warnings)
    assert (
        "runs must see equal voxels in an iteration "
        "(nnUNetTrainer: 8,192 (2 of 16x16x16); nnUNetTrainerB: 16,384 (4 of 16x16x16))" in first_line(found)
    )
    assert "differ in GPU or PyTorch" in warnings
    assert "nnUNetTrainerB, fold 0: unfinished, 3 of 9 epochs logged." in warnings


def test_validation_by_another_checkpoint_is_warned_of(make_run: MakeRun) -> None:
    a, b = make_run("nnUNetTrainer", random_folds(1)), make_run("nnUNetTrainerB", random_folds(1))
    (b / "fold_0" / "checkpoint_final.pth").rename(b / "fold_0" / "checkpoint_best.pth")
    log = "Validation complete\nMean Validation Dice:  {} \n"
    (b / "fold_1" / "training_log_1.txt").write_text(log.format(0.61) + log.format(0.63))
    warnings = "\n".join(run(a, b).warnings)
    assert "nnUNetTrainerB, fold 0: there is no checkpoint_final.pth" in warnings
    assert (
        "nnUNetTrainerB, fold 1: validated more than once with different results (mean Dice 0.6100, 0.6300)" in warnings
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no checkpoint at all"])
def test_broken_checkpoint_costs_its_curves_only(make_run: MakeRun, content: bytes) -> None:
    a, b = make_run("nnUNetTrainer", random_folds(1)), make_run("nnUNetTrainerB", random_folds(1))
    (b / "fold_0" / "checkpoint_final.pth").write_bytes(content)
    found = run(a, b)
    assert any("checkpoint_final.pth is not a complete checkpoint" in w for w in found.warnings)
    assert list(found.trainings["nnUNetTrainerB"].curves) == ["1"]


def test_checkpoint_that_would_run_code_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    import torch

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    a, b = make_run("nnUNetTrainer", random_folds(1)), make_run("nnUNetTrainerB", random_folds(1))
    torch.save({"logging": Evil()}, b / "fold_0" / "checkpoint_final.pth")
    found = run(a, b)
    assert not (tmp_path / "executed").exists()
    assert any("checkpoint_final.pth is not a complete checkpoint" in w for w in found.warnings)


def test_curves_and_times_are_those_of_the_checkpoints(make_run: MakeRun) -> None:
    found = run(make_run("nnUNetTrainer", random_folds(1)), make_run("nnUNetTrainerB", random_folds(1)))
    training = found.trainings["nnUNetTrainer"]
    assert training.curves["0"].training_loss == pytest.approx((0.1, 0.2, 0.3))
    assert (training.seconds_per_epoch, training.epochs, training.iterations) == (5.0, (3,), 50)


def test_cases_of_the_split_that_are_missing_or_were_trained_on_are_named(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folds = random_folds(1)
    names = [list(cases) for cases in folds.values()]
    splits = [{"train": [], "val": [*names[0], "case_99"]}, {"train": names[1][:1], "val": names[1][1:]}]
    folder = tmp_path / "preprocessed" / "Dataset007_Toy"
    folder.mkdir(parents=True)
    (folder / "splits_final.json").write_text(json.dumps(splits))
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    warnings = run(make_run("nnUNetTrainer", folds), make_run("nnUNetTrainerB", folds)).warnings
    assert "nnUNetTrainer, fold 0: missing of splits_final.json: 1 case (case_99)." in warnings
    assert any(
        "fold 1: not held back by splits_final.json, so perhaps trained on: 1 case (" in w and names[1][0] in w
        for w in warnings
    )


def test_segmentations_that_are_not_in_the_summary_are_named(make_run: MakeRun) -> None:
    a, b = make_run("nnUNetTrainer", random_folds(1)), make_run("nnUNetTrainerB", random_folds(1))
    for case in ("case_00", "case_77"):
        (a / "fold_0" / "validation" / f"{case}.nii.gz").touch()
    (a / "fold_0" / "validation" / ".DS_Store").touch()
    assert any(
        "not in summary.json, validate the fold again: 1 segmentation (" in w and "case_77" in w
        for w in run(a, b).warnings
    )


def test_structure_that_a_run_never_finds_is_warned_of(make_run: MakeRun) -> None:
    folds = random_folds(1)
    never = {fold: {case: [counts[0], (0, 0, 1000)] for case, counts in cases.items()} for fold, cases in folds.items()}
    warnings = run(make_run("nnUNetTrainer", folds), make_run("nnUNetTrainerB", never)).warnings
    assert [w for w in warnings if "no case at all" in w] == [
        "nnUNetTrainerB: finds lesion in no case at all; its training may have failed or been too short."
    ]


def test_edited_dice_is_warned_of(make_run: MakeRun) -> None:
    a, b = make_run("nnUNetTrainer", random_folds(1)), make_run("nnUNetTrainerB", random_folds(1))
    path = b / "fold_0" / "validation" / "summary.json"
    content = json.loads(path.read_text())
    content["metric_per_case"][2]["metrics"]["1"]["Dice"] = 0.99
    path.write_text(json.dumps(content))
    warnings = run(a, b).warnings
    assert [w for w in warnings if "does not follow" in w] == [
        "nnUNetTrainerB: the Dice of 1 score does not follow from its TP, FP and FN, validate again: case_02."
    ]


def test_plans_that_say_little_cost_the_size_only(make_run: MakeRun) -> None:
    folders = [make_run(name, random_folds(i)) for i, name in enumerate(("nnUNetTrainer", "nnUNetTrainerB"))]
    (folders[1] / "plans.json").write_text(json.dumps({"configurations": {"3d_fullres": {"inherits_from": "gone"}}}))
    found = run(*folders)
    assert len(found.evaluations[0].cases) == 12
    assert found.costs["nnUNetTrainerB"].batch_size is None


def test_foreign_trainer_is_compared_without_its_size(make_run: MakeRun) -> None:
    found = run(make_run("nnUNetTrainer", random_folds(1)), make_run("nnUNetTrainerOfAnother", random_folds(2)))
    assert found.costs["nnUNetTrainerOfAnother"].parameters is None
    assert found.costs["nnUNetTrainer"].parameters == 120 + 888 + 260 + 876 + 15
    assert any("nnUNetTrainerOfAnother: its network can't be built here" in w for w in found.warnings)


def test_other_labels_are_compared_where_they_are_shared(make_run: MakeRun) -> None:
    a, b = make_run("nnUNetTrainer", random_folds(1)), make_run("nnUNetTrainerB", random_folds(1))
    description = json.loads((b / "dataset.json").read_text())
    description["labels"] = {"background": 0, "organ": 1, "vessel": 2}
    (b / "dataset.json").write_text(json.dumps(description))
    found = run(a, b)
    assert found.evaluations[0].structures == ("organ",)
    assert any("nnUNetTrainerB: vessel is not compared" in w for w in found.warnings)
    description["labels"] = {"background": 0, "x": 1, "y": 2}
    (b / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(UsageError, match="must have structures in common"):
        run(a, b)


def test_copied_run_of_another_machine_needs_nothing_else(make_run: MakeRun, tmp_path: Path) -> None:
    a, b = make_run("nnUNetTrainer", random_folds(1)), make_run("nnUNetTrainerB", random_folds(2))
    moved = [
        shutil.move(folder, tmp_path / "usb" / folder.name)
        for folder in (a, b)
        if (tmp_path / "usb").mkdir(exist_ok=True) is None
    ]
    assert len(run(*map(Path, moved)).evaluations[0].cases) == 12


def test_benchmark_beside_the_report_adds_measured_memory_and_time(make_run: MakeRun, tmp_path: Path) -> None:
    a, b = make_run("nnUNetTrainer_3epochs", random_folds(1)), make_run("nnUNetTrainerNoMirroring", random_folds(2))
    record = {
        "trainer": "nnUNetTrainer",
        "peak_bytes": 1,
        "measured_peak_bytes": 123,
        "measured_inference_peak_bytes": 45,
        "case_seconds_mirrored": 6.5,
    }
    content = {
        "device": "H100",
        "precision": "mixed",
        "configuration": "3d_fullres",
        "patch_size": [16, 16, 16],
        "batch_size": 2,
        "plans": "nnUNetPlans",
        "methods": [record],
    }
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "benchmark.json").write_text(json.dumps(content))
    comparison = run(a, b, output=tmp_path / "out")
    costs = comparison.costs
    cost = costs["nnUNetTrainer_3epochs"]
    assert (cost.measured_peak, cost.measured_inference_peak, cost.case_seconds) == (123, 45, 6.5)
    assert cost.measured_on == "H100, mixed"
    assert (costs["nnUNetTrainerNoMirroring"].measured_peak, costs["nnUNetTrainerNoMirroring"].case_seconds) == (
        None,
        None,
    )
    # What is counted is the trainer's own step in float16 autocast, never the benchmark's figure of another run.
    setting = Setting(
        plans=json.loads((a / "plans.json").read_text()),
        dataset=json.loads((a / "dataset.json").read_text()),
        configuration="3d_fullres",
    )
    memory = training_memory(setting, "nnUNetTrainer")
    assert (cost.held, cost.peak) == (memory.held, memory.peak)
    rows = {row[0]: row[1:] for row in tables.cost(costs).rows}
    assert rows["peak memory of training [GB] (H100, mixed, measured)"] == ("0.00", tables.MISSING)
    assert "(1.00" in rows["memory held in training [GB] (float16 autocast, counted)"][1]
    content["patch_size"] = [32, 32, 32]
    (tmp_path / "out" / "benchmark.json").write_text(json.dumps(content))
    assert run(a, b, output=tmp_path / "out").costs["nnUNetTrainer_3epochs"].measured_peak is None
    (tmp_path / "out" / "benchmark.json").write_text("{}")
    with pytest.raises(UsageError, match=r"benchmark.json must be the JSON of `nnunet-ext benchmark`"):
        run(a, b, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -1.0}, "--margin must be 0 or more, got -1"),
        ({"margin": float("nan")}, "--margin must be 0 or more, got nan"),
        ({"tolerance": -2.0}, "--surface must be 0 or more"),
        ({"processes": 0}, "-np must be 1 or more"),
        ({"predictions": [Path("a")]}, "-pred and -ref belong together"),
        ({"folders": ()}, "what to compare must be given"),
        (
            {"dataset": "7"},
            "-d needs the environment variable nnUNet_results, which is not set: set it, or give --results",
        ),
        ({"dataset": "7", "results": Path("/nowhere")}, "must name an existing folder, got /nowhere"),
        ({"output": Path(__file__)}, "-o needs a folder"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        selection.request(Selection(**{"folders": (Path("x"),), **options}))


def test_mean_of_structures_is_that_of_nnunet(make_run: MakeRun) -> None:
    folds = {"0": {"a": [dice_counts(0.8), (0, 0, 0)], "b": [dice_counts(0.4), dice_counts(0.5)]}}
    evaluation = run(make_run("nnUNetTrainer", folds)).evaluations[0]
    assert evaluation.mean("nnUNetTrainer").mean == pytest.approx((0.6 + 0.5) / 2)
    assert evaluation.values("Dice", MEAN)["nnUNetTrainer"].tolist() == pytest.approx([0.8, 0.45])
