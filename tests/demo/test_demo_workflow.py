"""A demo's steps: their order, what a second run skips, continues or redoes, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nnunet_ext.demo import report, workflow
from nnunet_ext.demo.commands import CommandError
from nnunet_ext.demo.phantom import PhantomSpec, write_dataset
from nnunet_ext.demo.settings import Demo
from nnunet_ext.errors import UsageError
from tests.conftest import KilledPartial

if TYPE_CHECKING:
    from conftest import FakeNnunet

PLAN, TRAIN, PREDICT = (f"nnUNetv2_{name}" for name in ("plan_and_preprocess", "train", "predict"))
CONTINUE = f"{TRAIN} --c"
FOLD, PREPROCESSED = "nnUNet_results/*/*/fold_0", "nnUNet_preprocessed/*"
BOTH = ("nnUNetTrainer", "nnUNetTrainerReversible")
Run = Callable[..., list[str]]


def write_report(demo: Demo, *_: Any) -> None:
    runs = [{"trainer": demo.scheduled(name)} for name in demo.trainers]
    report.path(demo).with_suffix(".json").write_text(json.dumps({"runs": runs}))
    report.path(demo).touch()


@pytest.fixture
def run(demo: Demo, nnunet: FakeNnunet, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the demo with a report without numbers, return what it says; arguments replace what the user asks for."""
    monkeypatch.setattr(report, "write", write_report)
    monkeypatch.setattr(report, "summary", lambda _: [])

    def _run(interrupted_at: str = "", **changes: Any) -> list[str]:
        lines: list[str] = []
        nnunet.commands.clear()
        nnunet.interrupted_at = interrupted_at
        workflow.run(replace(demo, **changes), lambda line, _: lines.append(line))
        return lines

    return _run


@pytest.fixture
def finished(demo: Demo, run: Run) -> Path:
    """Folder of a finished demo."""
    run()
    return demo.root


def spoil(folder: Path, pattern: str, how: str) -> None:
    for path in list(folder.glob(pattern)):
        if how == "lost":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2)


def test_steps_come_in_order_for_every_trainer_and_once_for_one_named_twice(
    demo: Demo, run: Run, nnunet: FakeNnunet
) -> None:
    lines = run(trainers=(*BOTH, "nnUNetTrainer"))
    assert nnunet.names == [PLAN, TRAIN, TRAIN, PREDICT, PREDICT]
    titles = ["generate the phantom", "plan and preprocess", *(f"train {name}" for name in BOTH)]
    titles += [*(f"predict with {name}" for name in BOTH), "write the report"]
    done = [f"[{number}/7] {title}: done in" for number, title in enumerate(titles, start=1)]
    assert [line.rpartition(" in ")[0] + " in" for line in lines if ": done" in line] == done
    assert any(line.startswith("[3/7] train nnUNetTrainer: epoch 3/3, training loss -0.25, ") for line in lines)
    assert lines[:3] == [
        f"Demo in {demo.root}",
        "nnUNet_raw, nnUNet_preprocessed, nnUNet_results of the demo lie there; your own are left alone.",
        f"Dataset990_CTPhantom, 3d_fullres, 3epochs_2iters, cpu: {', '.join(BOTH)}",
    ]
    train, predict = nnunet.commands[2], " ".join(nnunet.commands[3])
    scheduled = "nnUNetTrainerReversible_3epochs_2iters"
    assert train[1:] == ["990", "3d_fullres", "0", "-tr", scheduled, "-device", "cpu"]
    assert " -f 0 -tr nnUNetTrainer_3epochs_2iters -chk checkpoint_final.pth " in predict
    run(schedule="full", trainers=("nnUNetTrainerNoMirroring",), root=demo.root / "full")
    assert "nnUNetTrainerNoMirroring" in nnunet.commands[1]


def test_second_run_skips_all_and_an_added_trainer_runs_alone(finished: Path, run: Run, nnunet: FakeNnunet) -> None:
    assert [line.partition("] ")[2].partition(": ")[2] for line in run()[3:-1]] == ["done by an earlier run"] * 5
    assert nnunet.commands == []
    assert "[7/7] write the report: done in" in run(trainers=BOTH)[-2]
    assert nnunet.names == [TRAIN, PREDICT]
    assert all("nnUNetTrainerReversible_3epochs_2iters" in command for command in nnunet.commands)
    assert "[5/5] write the report: done in" in run()[-2]  # it must not be about the other one any more
    assert nnunet.commands == []


@pytest.mark.parametrize(
    ("pattern", "how", "redone"),
    [
        ("report.html", "lost", []),
        ("report.json", "cut off", []),
        ("predictions/*/*.nii.gz", "lost", [PREDICT]),
        ("predictions/*/*.nii.gz", "cut off", [PREDICT]),
        (f"{FOLD}/validation/summary.json", "lost", [CONTINUE, PREDICT]),
        (f"{FOLD}/validation/summary.json", "cut off", [CONTINUE, PREDICT]),
        (f"{FOLD}/checkpoint_final.pth", "lost", [TRAIN, PREDICT]),
        (f"{FOLD}/checkpoint_final.pth", "cut off", [TRAIN, PREDICT]),
        (f"{PREPROCESSED}/data/*_000.pkl", "lost", [PLAN, TRAIN, PREDICT]),
        (f"{PREPROCESSED}/data/*_000.pkl", "cut off", [PLAN, TRAIN, PREDICT]),
        (f"{PREPROCESSED}/data/*_001.b2nd", "cut off", [PLAN, TRAIN, PREDICT]),
        (f"{PREPROCESSED}/gt_segmentations/*_004.nii.gz", "lost", [PLAN, TRAIN, PREDICT]),
        (f"{PREPROCESSED}/nnUNetPlans.json", "cut off", [PLAN, TRAIN, PREDICT]),
        ("nnUNet_raw/*/dataset.json", "lost", [PLAN, TRAIN, PREDICT]),
    ],
)
def test_results_that_are_lost_or_cut_off_are_redone_with_all_that_builds_on_them(
    finished: Path, run: Run, nnunet: FakeNnunet, pattern: str, how: str, redone: list[str]
) -> None:
    spoil(finished, pattern, how)
    assert "write the report: done in" in run()[-2]
    assert nnunet.names == redone


@pytest.mark.parametrize(
    ("command", "rest"), [(PLAN, [PLAN, TRAIN, PREDICT]), (TRAIN, [TRAIN, PREDICT]), (PREDICT, [PREDICT])]
)
def test_run_after_an_interruption_does_the_rest(
    demo: Demo, run: Run, nnunet: FakeNnunet, command: str, rest: list[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(interrupted_at=command)
    left = demo.root / "nnUNet_preprocessed" / demo.dataset / "dataset_fingerprint.json"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_text("{")  # nnU-Net would trust it
    run()
    assert nnunet.names == rest
    assert left.exists() is (command != PLAN)


def test_what_builds_on_a_redone_step_is_redone_also_after_an_interruption(
    finished: Path, run: Run, nnunet: FakeNnunet
) -> None:
    spoil(finished, f"{FOLD}/validation/summary.json", "lost")
    with pytest.raises(KeyboardInterrupt):
        run(interrupted_at=PREDICT)
    run()
    assert nnunet.names == [PREDICT]


def test_trainings_and_predictions_of_lost_data_are_redone_also_where_another_call_made_them(
    finished: Path, run: Run, nnunet: FakeNnunet
) -> None:
    run(trainers=(BOTH[1],))
    spoil(finished, f"{PREPROCESSED}/nnUNetPlans.json", "lost")
    run(trainers=(BOTH[1],))
    assert nnunet.names == [PLAN, TRAIN, PREDICT]
    run(trainers=BOTH)
    assert nnunet.names == [TRAIN, PREDICT]


@pytest.mark.parametrize("name", ["checkpoint_latest.pth", "checkpoint_best.pth"])
def test_interrupted_training_continues_from_its_last_whole_checkpoint(
    finished: Path, run: Run, nnunet: FakeNnunet, name: str
) -> None:
    (final,) = finished.glob(f"{FOLD}/checkpoint_final.pth")
    shutil.copy(final, final.with_name(name))
    spoil(finished, f"{FOLD}/checkpoint_final.pth", "cut off")
    run()
    assert nnunet.names[0] == CONTINUE


def test_command_that_leaves_no_results_is_a_failure(
    run: Run, nnunet: FakeNnunet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nnunet, PREDICT, lambda *_: None)
    with pytest.raises(CommandError, match=r"predict_nnUNetTrainer_3epochs_2iters.*without its results"):
        run()


def test_other_options_in_the_same_folder_are_refused(finished: Path, demo: Demo, run: Run, nnunet: FakeNnunet) -> None:
    for key, new in (("schedule", "4epochs_2iters"), ("configuration", "2d"), ("device", "cuda")):
        message = rf"other options \({key} {getattr(demo, key)}, now {new}\): choose .* --output"
        with pytest.raises(UsageError, match=message):
            run(**{key: new})
        assert nnunet.commands == []


@pytest.mark.parametrize(("available", "device"), [(False, "cpu"), (True, "cuda")])
def test_device_is_what_pytorch_finds_then_that_of_the_folder(
    run: Run, nnunet: FakeNnunet, monkeypatch: pytest.MonkeyPatch, available: bool, device: str
) -> None:
    for trainer, finds in (("nnUNetTrainer", available), ("nnUNetTrainerReversible", not available)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda finds=finds: finds)
        run(device=None, trainers=(trainer,))
        assert nnunet.commands[-1][-1] == device


def test_own_data_set_replaces_the_phantom_unless_it_is_cut_off_or_another_one(
    run: Run, nnunet: FakeNnunet, tmp_path: Path
) -> None:
    raw, other = tmp_path / "Dataset007_Mine", tmp_path / "Dataset008_Other"
    write_dataset(other, PhantomSpec(n_training=7, n_test=0, spacing=(9.0, 9.0, 9.0)))
    shutil.copytree(other, raw)
    spoil(raw, "imagesTr/phantom_002_0000.nii.gz", "cut off")
    with pytest.raises(UsageError, match=r"phantom_002 .*is cut off.*failures: 1; `nnunet-ext doctor"):
        run(raw=raw)
    assert nnunet.commands == []
    shutil.copytree(other, raw, dirs_exist_ok=True)
    run(raw=raw)
    assert nnunet.names == [PLAN, TRAIN, PREDICT]
    assert nnunet.commands[1][1] == "7"
    run(raw=raw)
    assert nnunet.commands == []
    with pytest.raises(UsageError, match=r"raw .*Dataset007_Mine, now .*Dataset008_Other"):
        run(raw=other)


def test_configuration_that_was_not_planned_is_refused(run: Run) -> None:
    with pytest.raises(UsageError, match=r"configurations 2d, 3d_fullres, got 3d_lowres: choose one"):
        run(configuration="3d_lowres")


@pytest.mark.parametrize(
    ("trainer", "schedule"),
    [
        ("nnUNetTrainer", "short"),
        ("nnUNetTrainer", ""),
        ("nnUNetTrainer", "x_3epochs"),
        ("nnUNetTrainerGone", "3epochs"),
        ("nnUNetTrainerNoMirroring", "3epochs"),  # has no schedules
    ],
)
def test_unknown_schedule_or_trainer_is_refused_before_anything_is_written(
    run: Run, demo: Demo, trainer: str, schedule: str
) -> None:
    message = rf"--trainers with --schedule .*got {trainer}_{schedule}: correct it"
    with pytest.raises(UsageError, match=message) as caught:
        run(trainers=(trainer,), schedule=schedule)
    assert "\n" not in str(caught.value)
    assert not demo.root.exists()


def test_folder_with_other_files_or_that_cant_be_made_is_refused(
    run: Run, demo: Demo, tmp_path: Path, killed_partial: KilledPartial
) -> None:
    demo.root.mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"can't write .*file/demo"):
        run(root=tmp_path / "file" / "demo")
    (demo.root / "nnUNet_raw").mkdir()
    with pytest.raises(UsageError, match=r"--output needs an empty .* holds nnUNet_raw: choose another"):
        run()
    assert os.listdir(demo.root) == ["nnUNet_raw"]
    (demo.root / "nnUNet_raw").rename(killed_partial(demo.root))  # a note that was cut off
    run()


def test_epoch_is_read_from_the_end_of_a_log() -> None:
    assert workflow.epoch("2026-01-01 00:00:00.0: Epo", "6epochs") == ""
    assert workflow.epoch("2026-01-01: Epoch 1 \nCurrent learning rate: 0.01 \n", "6epochs") == "epoch 2/6"
    text = "Epoch 1 \ntrain_loss 0.6854 \nEpoch time: 9.96 s \n"
    assert workflow.epoch(text, "6epochs") == "epoch 2/6, training loss 0.69"
    assert workflow.epoch("Epoch 10 \n", "full") == "epoch 11"


def test_help_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, nnunet_ext.cli.demo; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
