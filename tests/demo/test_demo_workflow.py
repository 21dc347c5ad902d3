"""A demo's steps: their order, what a second run skips, continues or redoes, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nnunet_ext.comparison import report as comparison_report
from nnunet_ext.demo import workflow
from nnunet_ext.demo.errors import ChildError
from nnunet_ext.demo.phantom import PhantomSpec, write_dataset
from nnunet_ext.demo.settings import Demo, Settings
from nnunet_ext.demo.steps import EpochWatch
from nnunet_ext.demo.workflow import Progress, default_device
from nnunet_ext.errors import UsageError
from tests.conftest import KilledPartial

if TYPE_CHECKING:
    from conftest import FakeNnunet

PLAN, TRAIN, PREDICT = (f"nnUNetv2_{name}" for name in ("plan_and_preprocess", "train", "predict"))
Run = Callable[..., list[Progress]]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "demo", None, ("nnUNetTrainer",), "3epochs_2iters", "3d_fullres", "cpu")


@pytest.fixture
def run(settings: Settings, nnunet: FakeNnunet, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the demo without tables and figures and return the news; keyword arguments replace settings."""
    monkeypatch.setattr(comparison_report, "_accuracy", lambda *_: comparison_report.Section("", (), ()))
    monkeypatch.setattr(comparison_report, "_cost", lambda _: comparison_report.Section("", (), ()))

    def _run(**changes: object) -> list[Progress]:
        news: list[Progress] = []
        nnunet.commands.clear()
        workflow.run(replace(settings, **changes), lambda _: None, news.append, nnunet)  # type: ignore[arg-type]
        return news

    return _run


def model(settings: Settings) -> Path:
    (folder,) = settings.output.glob("nnUNet_results/*/nnUNetTrainer_3epochs_2iters__nnUNetPlans__3d_fullres")
    return folder


def test_steps_come_in_order_for_every_trainer(run: Run, nnunet: FakeNnunet) -> None:
    news = run(trainers=("nnUNetTrainer", "nnUNetTrainerReversible"))
    assert nnunet.names == [PLAN, TRAIN, TRAIN, PREDICT, PREDICT]
    finished = [(n.number, n.total) for n in news if n.state == "finished"]
    assert finished == [(number, 7) for number in range(1, 8)]


def test_commands_ask_for_trainer_schedule_fold_and_device(run: Run, nnunet: FakeNnunet) -> None:
    run()
    train, predict = (next(c for c in nnunet.commands if c[0] == name) for name in (TRAIN, PREDICT))
    assert train[1:] == ("990", "3d_fullres", "0", "-tr", "nnUNetTrainer_3epochs_2iters", "-device", "cpu")
    assert " -f 0 -tr nnUNetTrainer_3epochs_2iters -chk checkpoint_final.pth " in " ".join(predict)


def test_full_schedule_adds_no_suffix(run: Run, nnunet: FakeNnunet) -> None:
    run(schedule="full", trainers=("nnUNetTrainerNoMirroring",))
    assert "nnUNetTrainerNoMirroring" in nnunet.commands[1]


def test_second_run_reuses_every_step(run: Run, nnunet: FakeNnunet) -> None:
    run()
    news = run()
    assert nnunet.commands == []
    assert [n.state for n in news] == ["reused"] * 5


def test_added_trainer_runs_alone(run: Run, nnunet: FakeNnunet) -> None:
    run()
    run(trainers=("nnUNetTrainer", "nnUNetTrainerReversible"))
    assert nnunet.names == [TRAIN, PREDICT]
    assert all("nnUNetTrainerReversible_3epochs_2iters" in " ".join(command) for command in nnunet.commands)


def test_trainer_named_twice_runs_once(run: Run, nnunet: FakeNnunet) -> None:
    run(trainers=("nnUNetTrainer", "nnUNetTrainer"))
    assert nnunet.names == [PLAN, TRAIN, PREDICT]


@pytest.mark.parametrize(
    ("lost", "redone"),
    [
        ("report.html", []),
        ("predictions/*/*.nii.gz", [PREDICT]),
        ("nnUNet_results/*/*/fold_0/validation/summary.json", [f"{TRAIN} --c", PREDICT]),
        ("nnUNet_results/*/*/fold_0/checkpoint_final.pth", [TRAIN, PREDICT]),
        ("nnUNet_preprocessed/*/data/*_000.pkl", [PLAN, f"{TRAIN} --c", PREDICT]),
        ("nnUNet_raw/*/dataset.json", [PLAN, f"{TRAIN} --c", PREDICT]),
    ],
)
def test_lost_results_are_redone_with_all_that_builds_on_them(
    run: Run, nnunet: FakeNnunet, settings: Settings, lost: str, redone: list[str]
) -> None:
    run()
    for path in list(settings.output.glob(lost)):
        path.unlink()
    news = run()
    assert nnunet.names == redone
    assert news[-1].state == "finished"


@pytest.mark.parametrize(
    ("cut", "redone"),
    [
        ("predictions/*/*.nii.gz", [PREDICT]),
        ("nnUNet_results/*/*/fold_0/validation/summary.json", [f"{TRAIN} --c", PREDICT]),
        ("nnUNet_results/*/*/fold_0/checkpoint_final.pth", [TRAIN, PREDICT]),
        ("nnUNet_preprocessed/*/data/*_000.pkl", [PLAN, f"{TRAIN} --c", PREDICT]),
        ("nnUNet_preprocessed/*/data/*_001.b2nd", [PLAN, f"{TRAIN} --c", PREDICT]),
    ],
)
def test_results_that_were_cut_off_are_redone(
    run: Run, nnunet: FakeNnunet, settings: Settings, cut: str, redone: list[str]
) -> None:
    run()
    (path, *_) = settings.output.glob(cut)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    run()
    assert nnunet.names == redone


@pytest.mark.parametrize(
    ("command", "rest"),
    [
        (PLAN, [PLAN, TRAIN, PREDICT]),
        (TRAIN, [TRAIN, PREDICT]),
        (PREDICT, [PREDICT]),
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ChildError("failed")])
def test_run_after_an_interruption_does_the_rest(
    run: Run, nnunet: FakeNnunet, command: str, rest: list[str], error: BaseException
) -> None:
    nnunet.fail[command] = error
    with pytest.raises(type(error)):
        run()
    run()
    assert nnunet.names == rest


@pytest.mark.parametrize("name", ["checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"])
def test_interrupted_training_continues_from_its_checkpoint(
    run: Run, nnunet: FakeNnunet, settings: Settings, name: str
) -> None:
    run()
    final = model(settings) / "fold_0" / "checkpoint_final.pth"
    final.rename(final.with_name(name))
    (model(settings) / "fold_0" / "validation" / "summary.json").unlink()
    run()
    assert nnunet.names[0] == f"{TRAIN} --c"


def test_checkpoint_that_was_cut_off_is_not_continued(
    run: Run, nnunet: FakeNnunet, settings: Settings
) -> None:
    run()
    final = model(settings) / "fold_0" / "checkpoint_final.pth"
    os.truncate(final, final.stat().st_size // 2)
    (model(settings) / "fold_0" / "validation" / "summary.json").unlink()
    run()
    assert nnunet.names[0] == TRAIN


def test_rest_of_an_interrupted_preprocessing_is_removed_first(
    run: Run, nnunet: FakeNnunet, settings: Settings
) -> None:
    nnunet.fail[PLAN] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run()
    fingerprint = (
        settings.output / "nnUNet_preprocessed" / "Dataset990_CTPhantom" / "dataset_fingerprint.json"
    )
    fingerprint.parent.mkdir(parents=True)
    fingerprint.write_text("{")
    run()
    assert not fingerprint.exists()


def test_command_that_leaves_no_results_is_a_failure(
    run: Run, nnunet: FakeNnunet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nnunet, PREDICT, lambda *_: None)
    with pytest.raises(ChildError, match=r"predict_nnUNetTrainer_3epochs_2iters.*without its results"):
        run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "4epochs_2iters"}, r"schedule 3epochs_2iters, now 4epochs_2iters"),
        ({"configuration": "2d"}, r"configuration 3d_fullres, now 2d"),
        ({"device": "cuda"}, r"device cpu, now cuda"),
    ],
)
def test_other_options_in_the_same_folder_are_refused(
    run: Run, nnunet: FakeNnunet, changes: dict[str, str], message: str
) -> None:
    run()
    with pytest.raises(UsageError, match=rf"other options \({message}\): choose .* --output") as caught:
        run(**changes)
    assert nnunet.commands == []
    assert "\n" not in str(caught.value)


def test_device_of_the_folder_is_kept_where_none_is_asked_for(run: Run, nnunet: FakeNnunet) -> None:
    run(device="mps")
    run(device=None, trainers=("nnUNetTrainerReversible",))
    assert nnunet.commands[0][-1] == "mps"


def test_default_device_is_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for available, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert default_device() == device


def test_own_data_set_replaces_the_phantom_and_another_one_is_refused(
    run: Run, nnunet: FakeNnunet, tmp_path: Path
) -> None:
    for name in ("Dataset007_Mine", "Dataset008_Other"):
        write_dataset(tmp_path / name, PhantomSpec(n_training=7, n_test=0, spacing=(9.0, 9.0, 9.0)))
    run(raw=tmp_path / "Dataset007_Mine")
    assert nnunet.commands[1][1] == "7"
    run(raw=tmp_path / "sub" / ".." / "Dataset007_Mine")
    assert nnunet.commands == []
    with pytest.raises(UsageError, match=r"raw .*Dataset007_Mine, now .*Dataset008_Other"):
        run(raw=tmp_path / "Dataset008_Other")


def test_own_data_set_with_a_cut_scan_is_refused_before_anything_runs(
    run: Run, nnunet: FakeNnunet, tmp_path: Path
) -> None:
    raw = tmp_path / "Dataset007_Mine"
    write_dataset(raw, PhantomSpec(n_training=7, n_test=0, spacing=(9.0, 9.0, 9.0)))
    path = raw / "imagesTr" / "phantom_002_0000.nii.gz"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        UsageError, match=r"phantom_002 .*can't be read: it is cut off.*failures: 1; `nnunet-ext doctor"
    ):
        run(raw=raw)
    assert nnunet.commands == []
    path.write_bytes(content)
    run(raw=raw)
    assert nnunet.names == [PLAN, TRAIN, PREDICT]


def test_configuration_that_was_not_planned_is_refused(run: Run) -> None:
    with pytest.raises(UsageError, match=r"-c needs .*\(2d, 3d_fullres\), got 3d_lowres"):
        run(configuration="3d_lowres")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "short"}, r"--schedule needs .*got 'short'"),
        ({"schedule": ""}, r"--schedule needs .*got ''"),
        ({"schedule": "x_3epochs"}, r"--schedule needs .*got 'x_3epochs'"),
        (
            {"trainers": ("nnUNetTrainerGone",)},
            r"--trainers needs .*nnunet-ext list.*got 'nnUNetTrainerGone'",
        ),
        ({"trainers": ("nnUNetTrainerNoMirroring",)}, r"--trainers needs .*got 'nnUNetTrainerNoMirroring'"),
    ],
)
def test_unknown_schedule_or_trainer_is_refused_before_anything_is_written(
    run: Run, settings: Settings, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(**changes)
    assert not settings.output.exists()


def test_folder_with_other_files_is_refused(run: Run, settings: Settings) -> None:
    (settings.output / "nnUNet_raw").mkdir(parents=True)
    with pytest.raises(
        UsageError, match=r"--output needs an empty folder .* holds nnUNet_raw: choose another"
    ):
        run()
    assert os.listdir(settings.output) == ["nnUNet_raw"]


def test_note_that_was_cut_off_does_not_block_the_folder(
    run: Run, settings: Settings, killed_partial: KilledPartial
) -> None:
    settings.output.mkdir()
    killed_partial(settings.output).write_text("{")
    run()
    assert json.loads((settings.output / "demo.json").read_text())["schedule"] == "3epochs_2iters"


def test_output_that_cant_be_made_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"can't write .*file/demo"):
        run(output=tmp_path / "file" / "demo")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_write_access_is_named(run: Run, settings: Settings) -> None:
    settings.output.mkdir(mode=0o500)
    with pytest.raises(UsageError, match=r"can't write .*demo.*Permission denied"):
        run()


def test_training_reports_its_epoch(run: Run) -> None:
    statuses = [n.status for n in run() if n.title == "train nnUNetTrainer" and n.state == "running"]
    assert statuses == ["epoch 3/3, training loss -0.25"]


def test_epochs_are_read_from_pieces_of_a_log() -> None:
    watch = EpochWatch(6)
    assert watch.read("2026-01-01 00:00:00.0: Epo") == ""
    assert watch.read("ch 1 \n2026-01-01: Current learning rate: 0.01 \n") == "epoch 2/6"
    assert watch.read("train_loss 0.6854 \nEpoch time: 9.96 s \n") == "epoch 2/6, training loss 0.69"
    assert EpochWatch(None).read("Epoch 10 \n") == "epoch 11"


def test_help_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, nnunet_ext.cli.demo; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_paths_of_a_demo() -> None:
    demo = Demo(Path("/d"), "Dataset007_Mine", ("nnUNetTrainer",), "2epochs", "2d", "cpu")
    assert demo.dataset_id == "7"
    assert demo.model("nnUNetTrainer") == Path(
        "/d/nnUNet_results/Dataset007_Mine/nnUNetTrainer_2epochs__nnUNetPlans__2d"
    )
