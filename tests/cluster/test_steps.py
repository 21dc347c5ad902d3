from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_ext.cluster.request import Method
from nnunet_ext.cluster.steps import Reading, make_steps
from nnunet_ext.cluster.training import Training
from nnunet_ext.cluster.work import Commands, StepError
from nnunet_ext.errors import UsageError
from tests.cluster.conftest import DATASET, Asked

Fake = Callable[[dict[str, str]], None]
TRAINER = "nnUNetTrainer_3epochs"


@pytest.fixture
def commands(tmp_path: Path, asked: Asked) -> Commands:
    variables = {**asked().variables, "nnUNet_def_n_proc": "1"}
    return Commands(tmp_path / "step.log", variables, 0, lambda: False)


def training(fold: int = 0, configuration: str = "3d_fullres") -> str:
    return f"{DATASET}__{TRAINER}__nnUNetPlans__{configuration}__fold_{fold}"


def test_folds_wait_for_plans_and_reports_for_all_folds(asked: Asked) -> None:
    steps = make_steps(asked())
    folds = tuple(training(fold) for fold in range(5))
    assert [*steps] == [
        f"{DATASET}__plan__nnUNetPlans",
        *folds,
        f"{DATASET}__best__{TRAINER}__nnUNetPlans",
        f"{DATASET}__compare",
    ]
    assert all(steps[fold].needs == (f"{DATASET}__plan__nnUNetPlans",) for fold in folds)
    assert steps[f"{DATASET}__compare"].needs == folds


def test_some_folds_have_no_best_configuration(asked: Asked) -> None:
    assert not any("__best__" in name for name in make_steps(asked(folds=(0, 1))))


def test_planners_of_one_data_set_work_one_after_the_other(asked: Asked) -> None:
    methods = tuple(Method(trainer=TRAINER, plans=plans) for plans in ("nnUNetPlans", "nnUNetHalfWidthPlans"))
    steps = make_steps(asked(methods=methods))
    second = steps[f"{DATASET}__plan__nnUNetHalfWidthPlans"]
    assert (second.needs, second.after) == ((), (f"{DATASET}__plan__nnUNetPlans",))


def test_a_second_stage_waits_for_all_folds_of_the_first(asked: Asked) -> None:
    steps = make_steps(asked(configurations=("3d_cascade_fullres",), folds=(1,)))
    first = tuple(training(fold, "3d_lowres") for fold in range(5))
    second = steps[training(1, "3d_cascade_fullres")]
    assert second.needs == first
    assert all(name in steps for name in first)
    assert steps[f"{DATASET}__compare"].needs == (second.name,)
    before = [*steps][: [*steps].index(second.name)]
    assert set(first) < set(before)


def test_the_stage_before_is_read_from_plans_that_are_there(asked: Asked) -> None:
    made = asked(configurations=("mine",), folds=(0,))
    folder = made.preprocessed / DATASET
    folder.mkdir(parents=True)
    plans = {"configurations": {"mine": {"previous_stage": "low"}, "low": {"next_stage": "mine"}}}
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    steps = make_steps(made)
    assert steps[training(0, "mine")].needs == tuple(training(fold, "low") for fold in range(5))
    plans["configurations"]["low"]["previous_stage"] = "mine"
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    (broken,) = make_steps(made).values()
    assert isinstance(broken, Reading)
    assert "form a circle" in broken.reason


def test_planning_makes_what_is_missing_and_nothing_twice(asked: Asked, fake: Fake, commands: Commands) -> None:
    methods = tuple(Method(trainer=TRAINER, plans=plans) for plans in ("nnUNetPlans", "nnUNetHalfWidthPlans"))
    made = asked(methods=methods, folds=(0,))
    steps = [step for name, step in make_steps(made).items() if "__plan__" in name]
    for step in steps:
        assert not step.is_done()
        step.work(commands)
        assert step.is_done()
    folder = made.preprocessed / DATASET
    assert (folder / "data" / "made.txt").read_text() == "preprocessed\n"  # both plans share them
    splits = json.loads((folder / "splits_final.json").read_text())
    assert sorted(case for split in splits for case in split["val"]) == sorted(f"case{number}" for number in range(10))
    (folder / "data" / "case3_seg.b2nd").unlink()
    assert not steps[0].is_done()


def test_the_split_is_the_one_that_nnunet_makes(asked: Asked, fake: Fake, commands: Commands) -> None:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    step = next(iter(make_steps(asked()).values()))
    step.work(commands)
    made = json.loads((step.asked.preprocessed / DATASET / "splits_final.json").read_text())
    assert made == generate_crossval_split(sorted(f"case{number}" for number in range(10)), seed=12345, n_splits=5)


def test_a_data_set_without_five_cases_is_named(asked: Asked, fake: Fake, commands: Commands) -> None:
    step = next(iter(make_steps(asked()).values()))
    for path in sorted((step.asked.raw / DATASET / "imagesTr").iterdir())[:7]:
        path.unlink()
    with pytest.raises(StepError, match="can't be split into five folds"):
        step.work(commands)


def test_a_configuration_that_the_planner_left_out_is_named(asked: Asked, fake: Fake, commands: Commands) -> None:
    made = asked(configurations=("2d",))
    step = next(iter(make_steps(made).values()))
    with pytest.raises(StepError, match="have no 2d, but 3d_fullres, 3d_lowres"):
        step.work(commands)
    assert not step.is_done()


@pytest.fixture
def fold(asked: Asked, fake: Fake, commands: Commands) -> Training:
    """A fold of a planned data set."""
    steps = make_steps(asked())
    steps[f"{DATASET}__plan__nnUNetPlans"].work(commands)
    found = steps[training()]
    assert isinstance(found, Training)
    return found


def calls(fold: Training) -> list[str]:
    return (fold.folder / "calls.txt").read_text().splitlines()


def test_a_fold_is_trained_by_the_standard_command_and_validated(fold: Training, commands: Commands) -> None:
    fold.work(commands)
    assert fold.is_done()
    assert calls(fold) == [f"{DATASET} 3d_fullres 0 -tr {TRAINER} -p nnUNetPlans -device cpu"]


def test_a_validation_that_is_missing_or_cut_off_is_repeated_alone(fold: Training, commands: Commands) -> None:
    fold.work(commands)
    (fold.folder / "validation" / "summary.json").write_text('{"met')
    assert not fold.is_done()
    fold.work(commands)
    assert fold.is_done()
    assert calls(fold)[-1].endswith("--val")


def test_a_validation_of_an_earlier_training_does_not_count(fold: Training, commands: Commands) -> None:
    fold.work(commands)
    later = (fold.folder / "validation" / "summary.json").stat().st_mtime_ns + 1
    os.utime(fold.folder / "checkpoint_final.pth", ns=(later, later))
    assert not fold.is_done()


def test_a_training_goes_on_from_a_checkpoint_that_is_whole(fold: Training, commands: Commands) -> None:
    fold.work(commands)
    (fold.folder / "checkpoint_final.pth").rename(fold.folder / "checkpoint_best.pth")
    (fold.folder / "checkpoint_latest.pth").write_bytes(b"cut off")
    fold.work(commands)
    assert calls(fold)[-1].endswith("--c")
    assert (fold.folder / "checkpoint_latest.pth.damaged").read_bytes() == b"cut off"


def test_a_checkpoint_that_can_not_be_read_now_is_left_alone(
    fold: Training, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold.work(commands)

    def stale(path: Path) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("nnunet_ext.nnunet.checkpoints.check_whole", stale)
    with pytest.raises(UsageError, match="Stale file handle"):
        fold.work(commands)
    assert (fold.folder / "checkpoint_final.pth").is_file()


def test_a_killed_training_goes_on_at_once(fold: Training, commands: Commands, fake: Fake) -> None:
    fake({"fold_0": "kill"})
    fold.work(commands)
    assert fold.is_done()
    assert [call.endswith("--c") for call in calls(fold)] == [False, True]


def test_a_training_that_is_killed_where_it_was_killed_before_fails(
    fold: Training, commands: Commands, fake: Fake
) -> None:
    fake({"fold_0": "kill always"})
    with pytest.raises(StepError, match=r"ended by SIGKILL \(out of memory\?\)"):
        fold.work(commands)
    assert len(calls(fold)) == 2


def test_a_training_that_diverges_is_named_and_never_done(fold: Training, commands: Commands, fake: Fake) -> None:
    fake({"fold_0": "nan"})
    with pytest.raises(StepError, match=r"diverged: the training loss of the last 3 epochs until 3 .* delete"):
        fold.work(commands)
    assert (fold.folder / "validation" / "summary.json").exists()
    assert not fold.is_done()


def test_the_reason_of_a_failed_training_is_its_error(fold: Training, commands: Commands, fake: Fake) -> None:
    fake({"fold_0": "crash"})
    with pytest.raises(StepError, match=r"^ValueError: the planted fault$"):
        fold.work(commands)


def test_a_first_stage_is_done_when_the_second_has_its_priors(asked: Asked, fake: Fake, commands: Commands) -> None:
    made = asked(configurations=("3d_cascade_fullres",), folds=(0,))
    steps = make_steps(made)
    steps[f"{DATASET}__plan__nnUNetPlans"].work(commands)
    first = steps[training(0, "3d_lowres")]
    assert isinstance(first, Training)
    first.work(commands)
    assert first.is_done()
    next((first.model / "predicted_next_stage" / "3d_cascade_fullres").iterdir()).unlink()
    assert not first.is_done()


def test_several_gpus_are_nnunets_distributed_training(asked: Asked) -> None:
    step = make_steps(asked(device="cuda", gpus=2, npz=True))[training()]
    assert isinstance(step, Training)
    assert step.gpus == 2
    assert " ".join(step._command()).endswith("-device cuda -num_gpus 2 --npz")


def test_a_report_is_made_again_when_a_validation_is_newer(fold: Training, commands: Commands, asked: Asked) -> None:
    made = asked(folds=(0,))
    report = make_steps(made)[f"{DATASET}__compare"]
    fold.work(commands)
    assert not report.is_done()
    report.work(commands)
    assert report.is_done()
    words = json.loads((made.output / DATASET / "comparison" / "report.json").read_text())
    assert words[:5] == ["compare", "-m", str(fold.model), "-f", "0"]
    later = (made.output / DATASET / "comparison" / "report.json").stat().st_mtime_ns + 10**9
    os.utime(fold.folder / "validation" / "summary.json", ns=(later, later))
    assert not report.is_done()


def test_the_instructions_of_each_method_are_kept(fold: Training, commands: Commands) -> None:
    steps = make_steps(fold.asked)
    for number in range(5):
        steps[training(number)].work(commands)
    best = steps[f"{DATASET}__best__{TRAINER}__nnUNetPlans"]
    best.work(commands)
    assert best.is_done()
    text = (fold.asked.output / DATASET / f"{TRAINER}__nnUNetPlans.txt").read_text()
    assert f"-tr {TRAINER} -p nnUNetPlans -c 3d_fullres -f 0 1 2 3 4 --disable_ensembling" in text
