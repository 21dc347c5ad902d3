"""The report holds the numbers that nnU-Net wrote, the commands that ran and the figures."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nnunet_ext.demo import report, workflow
from nnunet_ext.demo.report import Model, Report, label_names
from nnunet_ext.demo.settings import Settings

if TYPE_CHECKING:
    from conftest import FakeNnunet

TRAINERS = ("nnUNetTrainer", "nnUNetTrainerReversible")


@pytest.fixture
def written(tmp_path: Path, nnunet: FakeNnunet) -> Report:
    settings = Settings(tmp_path / "demo", None, TRAINERS, "3epochs_2iters", "3d_fullres", "cpu")
    return workflow.run(settings, lambda _: None, lambda _: None, nnunet)


def test_report_holds_the_measured_numbers(written: Report) -> None:
    text = written.path.read_text()
    names = [f"{trainer}_3epochs_2iters" for trainer in TRAINERS]
    assert f"| structure | `{names[0]}` | `{names[1]}` |" in text
    assert "| liver | 0.500 | 0.500 |" in text
    assert "| spleen | - | - |" in text
    assert "| **mean** | **0.500** | **0.500** |" in text
    assert f"| `{names[1]}` | 3 | 5.0 | 0.500 |" in text


def test_numbers_are_strict_json_and_can_be_read_back(written: Report) -> None:
    assert "NaN" not in written.path.with_suffix(".json").read_text()
    first = written.models[0]
    assert [model.trainer for model in written.models] == [f"{name}_3epochs_2iters" for name in TRAINERS]
    assert (first.epochs, first.seconds_per_epoch, first.mean_dice) == (3, 5.0, 0.5)
    assert first.dice == {"liver": 0.5, "spleen": None}


def test_every_figure_that_the_report_shows_is_there(written: Report) -> None:
    shown = re.findall(r"!\[.*?\]\((.*?)\)", written.path.read_text())
    assert shown == ["figures/learning_curves.png", "figures/phantom_005.png"]
    for name in shown:
        assert (written.path.parent / name).read_bytes().startswith(b"\x89PNG")


def test_commands_are_those_that_ran(written: Report, nnunet: FakeNnunet) -> None:
    block = written.path.read_text().partition("```bash\n")[2].partition("\n```")[0].splitlines()
    folders, lines = block[:3], block[3:]
    assert folders[0] == f"export nnUNet_raw={written.path.parent / 'nnUNet_raw'}"
    assert lines == [shlex.join(command) for command in nnunet.commands]
    assert json.loads(written.path.with_suffix(".json").read_text())["commands"] == lines


def test_names_of_labels_and_regions_follow_nnunets_keys() -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    assert label_names(labels) == {"0": "background", "(1, 2)": "whole", "2": "core", "3": "ignore"}


def test_structure_that_one_trainer_lacks_is_a_dash() -> None:
    models = [Model(name, dice, 0.5, 0.5, 1.0, 1) for name, dice in (("A", {"x": 0.25}), ("B", {"y": 0.5}))]
    assert report._dice_table(models)[2:4] == ["| x | 0.250 | - |", "| y | - | 0.500 |"]
