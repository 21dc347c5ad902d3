"""The demo's report compares its models on validation cases and unseen scans, and holds the commands that ran."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nnunet_ext.demo import workflow
from nnunet_ext.demo.report import Report
from nnunet_ext.demo.settings import Settings

if TYPE_CHECKING:
    from conftest import FakeNnunet

TRAINERS = ("nnUNetTrainer", "nnUNetTrainerReversible")


@pytest.fixture
def written(tmp_path: Path, nnunet: FakeNnunet) -> Report:
    settings = Settings(tmp_path / "demo", None, TRAINERS, "3epochs_2iters", "3d_fullres", "cpu")
    return workflow.run(settings, lambda _: None, lambda _: None, nnunet)


def test_report_compares_validation_cases_and_unseen_scans(written: Report) -> None:
    content = json.loads(written.path.with_suffix(".json").read_text())
    validation, unseen = content["evaluations"]
    dice = {
        m["run"]: m["mean"] for m in validation["means"] if (m["metric"], m["structure"]) == ("Dice", "mean")
    }
    assert dice == pytest.approx(dict.fromkeys(TRAINERS, 0.5))
    assert unseen["name"] == "held-out"
    assert unseen["cases"] == ["phantom_005"]


def test_models_of_the_report_hold_its_numbers(written: Report) -> None:
    # the stand-in predicts the references themselves
    assert [(m.trainer, m.dice, m.seconds_per_epoch) for m in written.models] == [
        (t, 1.0, 5.0) for t in TRAINERS
    ]


def test_report_says_what_it_is_not(written: Report) -> None:
    assert "says nothing about the quality" in written.path.read_text()


def test_commands_are_those_that_ran_and_the_comparison(written: Report, nnunet: FakeNnunet) -> None:
    text = written.path.with_suffix(".md").read_text()
    folders, lines = (
        (block := text.partition("```bash\n")[2].partition("\n```")[0].splitlines())[:3],
        block[3:],
    )
    assert folders[0] == f"export nnUNet_raw={written.path.parent / 'nnUNet_raw'}"
    assert lines[:-1] == [shlex.join(command) for command in nnunet.commands]
    assert lines[-1].startswith("nnunet-ext compare -m ")
