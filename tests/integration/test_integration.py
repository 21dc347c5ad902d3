"""The matrix tells a good result from a bad one, goes on where it was stopped, and runs one trainer as it runs all."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_ext import registry
from nnunet_ext.architectures.reversible.steps import Step
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.protocols import only_predicts
from tests.integration import commands
from tests.integration.__main__ import main
from tests.integration.checks import RawDataset, check_predictions, check_probabilities, check_weights, mean_dice
from tests.integration.forms import FORMS, LABELS, write_raw
from tests.integration.matrix import Matrix
from tests.integration.outcome import CheckError, Outcome, outcome_of
from tests.integration.plans import PLANS, STAGES, prepare_stages, staged_plans
from tests.integration.scenario import Scenario

PHANTOMS = {form.kind: form for form in FORMS if not form.source.folder}
TRAINERS = registry.names("trainers")
PREDICTING = [name for name in TRAINERS if only_predicts(trainer_class(name))]
TRAINING = next(name for name in TRAINERS if name not in PREDICTING)


def raw_dataset(kind: str, folder: Path) -> RawDataset:
    write_raw(PHANTOMS[kind], folder / "raw", None)
    return RawDataset(folder / "raw")


def test_a_trainer_passes_all_cells_once_and_one_that_only_predicts_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--output", str(tmp_path), "--forms", "phantom-regions-ignore", "--trainers", TRAINING, *PREDICTING]
    assert main(asked) == 0
    content = json.loads((tmp_path / "integration.json").read_text())
    rows = content["scenarios"]
    found = {(row["trainer"], step): cell[0] for row in rows for step, cell in row["cells"].items()}
    steps = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres", "best", "inference")
    wanted = {(TRAINING, step): "pass" for step in steps}
    wanted |= {(name, step): "documented" for name in PREDICTING for step in steps}
    assert found == wanted
    printed = capsys.readouterr().out
    assert f"| `{TRAINING}` |" + " ok |" * len(steps) in printed
    assert (tmp_path / "integration.md").read_text() in printed

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"{arguments} is run again")

    monkeypatch.setattr(commands, "run", refuse)
    assert main(asked) == 0
    assert (tmp_path / "integration.md").read_text() in capsys.readouterr().out


def test_failed_cell_is_shown_with_its_error_and_in_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = {"2d": Outcome(status="pass", text=""), "3d_fullres": Outcome(status="fail", text="no weights")}
    monkeypatch.setattr(Matrix, "run", lambda self, on_cell: None)
    monkeypatch.setattr(Matrix, "cells", lambda self, scenario: cells)
    assert main(["--output", str(tmp_path), "--forms", "phantom-plain", "--trainers", TRAINING]) == 1
    printed = capsys.readouterr().out
    assert f"| `{TRAINING}` | ok | **FAIL** (1) |" in printed
    assert "1. fail: no weights" in printed
    assert "1 fail, 4 are not run yet" in printed


def test_report_of_what_is_done_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Matrix, "run", lambda self, on_cell: pytest.fail("is run"))
    asked = ["--output", str(tmp_path), "--forms", "phantom-plain", "--trainers", TRAINING]
    assert main([*asked, "--report"]) == 0
    assert "0 fail, 6 are not run yet" in (tmp_path / "integration.md").read_text()


def test_a_cell_that_needs_a_failed_one_is_not_run_and_the_best_is_sought_among_those_that_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, configurations = PHANTOMS["plain"], ("2d", "3d_lowres", "3d_cascade_fullres")
    plans = {"2d": {}, "3d_lowres": {}, "3d_cascade_fullres": {"previous_stage": "3d_lowres"}}
    folder = tmp_path / "preprocessed" / form.dataset
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps({"configurations": plans}))
    scenario = Scenario(
        trainer=TRAINING, form=form, plans="plans", configurations=configurations, folder=tmp_path, log=tmp_path / "log"
    )

    def work(self: Scenario, step: str) -> Callable[[dict[str, Outcome]], str]:
        def run(done: dict[str, Outcome]) -> str:
            if step == "3d_lowres":
                raise ValueError("planted")
            return "done"

        return run

    monkeypatch.setattr(Scenario, "_work", work)
    found = dict(scenario.run({}))
    statuses = {step: outcome.status for step, outcome in found.items()}
    assert statuses == {
        "2d": "pass", "3d_lowres": "fail", "3d_cascade_fullres": "fail", "best": "pass", "inference": "pass"
    }  # fmt: skip
    assert found["3d_cascade_fullres"].text.startswith("not run: ValueError")


def test_result_of_other_code_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = Matrix(output=tmp_path, data=None, forms=(PHANTOMS["plain"],), trainers=(TRAINING,))
    (scenario,) = matrix.scenarios(PHANTOMS["plain"])
    done = {"2d": Outcome(status="pass", text="Dice 0.5", seconds=1.5)}
    matrix._write(scenario, done)
    assert matrix.cells(scenario) == done
    monkeypatch.setattr("tests.integration.matrix.code", lambda: "other")
    assert matrix.cells(scenario) == {}


@pytest.mark.parametrize("is_shared", [True, False])
def test_data_that_a_planner_of_stages_does_not_share_are_preprocessed(is_shared: bool, tmp_path: Path) -> None:
    planner, stages = next(iter(STAGES.items()))
    name = staged_plans()[planner][1]
    data = f"{PLANS if is_shared else name}_3d_fullres"
    (tmp_path / f"{PLANS}_3d_fullres").mkdir()
    network = {"n_stages": 2, "strides": [[1, 1, 1], [2, 2, 2]]}
    planned = {"patch_size": [8, 8, 8], "data_identifier": data, "architecture": {"arch_kwargs": network}}
    commands_run: list[str] = []

    def run(command: str, *arguments: Any) -> None:
        commands_run.append(command)
        content = {"configurations": {key: deepcopy(planned) for key in ("3d_fullres", *stages)}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    for _ in range(2):  # the second time all is there
        prepare_stages(PHANTOMS["plain"], tmp_path, planner, run)
    assert commands_run == ["nnUNetv2_plan_experiment", *["nnUNetv2_preprocess"] * (not is_shared)]


def raise_without_cure() -> str:
    raise NotImplementedError("Not here.")


def raise_of_another_kind() -> str:
    raise NotImplementedError("A rule: with a cure.")  # of this module


def raise_of_torch() -> str:
    return str(torch.nn.Module()(torch.ones(1)))


def raise_of_the_package() -> str:
    step = Step.__new__(Step)
    return str(step.invert(()))


@pytest.mark.parametrize(
    ("work", "status"),
    [
        (raise_without_cure, "fail"),
        (raise_of_another_kind, "fail"),
        (raise_of_torch, "fail"),
        (raise_of_the_package, "documented"),
    ],
)
def test_only_a_sentence_of_the_package_with_a_cure_is_documented(work: Callable[[], str], status: str) -> None:
    assert outcome_of(work).status == status


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_phantoms_hold_all_classes_and_what_is_predictable_is_not_the_ignore_label(
    kind: str, tmp_path: Path
) -> None:
    raw = raw_dataset(kind, tmp_path)
    labels = LABELS[kind]["labels"]
    ignore = labels.get("ignore")
    values = {value for item in labels.values() for value in (item if isinstance(item, list) else [item])}
    for path in (tmp_path / "raw" / "labelsTr").iterdir():
        assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))) == values
    assert ignore not in raw.predictable
    assert raw.predictable == {0, 1} if kind == "ignore" else {0, 1, 2}
    assert len(raw.scored) == (1 if kind == "ignore" else 2)


def write_prediction(path: Path, like: Path, value: int = 1, shift: float = 0.0) -> None:
    image = sitk.ReadImage(str(like))
    array = np.zeros(sitk.GetArrayFromImage(image).shape, dtype=np.uint8)
    array[0] = value
    predicted = sitk.GetImageFromArray(array)
    predicted.CopyInformation(image)
    predicted.SetOrigin([value + shift for value in image.GetOrigin()])
    sitk.WriteImage(predicted, str(path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"value": 2}, r"holds \[2\], allowed are \[0, 1\]"),
        ({"value": 3}, r"holds \[3\]"),
        ({"shift": 1.0}, "origin"),
        (None, "no prediction of"),
    ],
)
def test_prediction_with_a_planted_fault_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    raw = raw_dataset("ignore", tmp_path)
    (case,) = raw.unseen()
    if change is not None:
        write_prediction(tmp_path / f"{case}.nii.gz", raw.image(case), **change)
    if not said:
        check_predictions(tmp_path, [case], raw)
        return
    with pytest.raises(CheckError, match=said):
        check_predictions(tmp_path, [case], raw)


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf"), 1.5, -0.5])
def test_probabilities_are_finite_and_from_zero_to_one(value: float, tmp_path: Path) -> None:
    np.savez(tmp_path / "case.npz", probabilities=np.full((2, 3), value))
    if value == 0.5:
        check_probabilities(tmp_path, ["case"])
        return
    with pytest.raises(CheckError, match="not finite"):
        check_probabilities(tmp_path, ["case"])


@pytest.mark.parametrize(
    ("mean", "said"),
    [
        ({"(1, 2)": 0.5, "1": 0.0}, ""),
        ({"(1, 2)": 0.5, "1": float("nan")}, "not finite"),
        ({"(1, 2)": 0.5}, "scores"),
        ({"(1, 2)": 0.5, "1": 0.0, "3": 0.0}, "scores"),
    ],
)
def test_summary_must_score_all_regions_and_no_other(mean: dict[str, float], said: str, tmp_path: Path) -> None:
    raw = raw_dataset("regions-ignore", tmp_path)
    content = {"mean": {label: {"Dice": dice} for label, dice in mean.items()}, "foreground_mean": {"Dice": 0.25}}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    if not said:
        assert mean_dice(tmp_path / "summary.json", raw) == 0.25
        return
    with pytest.raises(CheckError, match=said):
        mean_dice(tmp_path / "summary.json", raw)


@pytest.mark.parametrize("where", ["", "other", "train_losses", "val_losses"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_and_losses_that_are_not_finite_are_refused(where: str, value: float, tmp_path: Path) -> None:
    weights = {"good": torch.ones(2), "other": torch.ones(2), "extra": {"no": "tensor"}}
    losses = {"train_losses": [0.5], "val_losses": [0.5]}
    if where == "other":
        weights["other"] = torch.tensor([1.0, value])
    elif where:
        losses[where] = [value]
    torch.save({"network_weights": weights, "logging": losses}, tmp_path / "checkpoint_final.pth")
    if not where:
        check_weights(tmp_path / "checkpoint_final.pth")
        return
    with pytest.raises(CheckError, match=where):
        check_weights(tmp_path / "checkpoint_final.pth")
