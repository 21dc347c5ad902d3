"""The demo's report compares its models on validation cases and unseen scans, and holds the commands that ran."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nnunet_ext.demo import workflow
from nnunet_ext.demo.settings import Demo

if TYPE_CHECKING:
    from conftest import FakeNnunet

TRAINERS = ("nnUNetTrainer", "nnUNetTrainerReversible")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, nnunet: FakeNnunet) -> tuple[Path, list[str]]:
    """Folder of a demo, and what it says."""
    folder = tmp_path_factory.mktemp("report")
    demo = Demo(
        root=folder, raw=None, trainers=TRAINERS, schedule="3epochs_2iters", configuration="3d_fullres", device="cpu"
    )
    lines: list[str] = []
    workflow.run(demo, lambda line, _: lines.append(line))
    return folder, lines


def test_report_compares_validation_cases_and_unseen_scans(written: tuple[Path, list[str]]) -> None:
    folder, said = written
    content = json.loads((folder / "report.json").read_text())
    validation, unseen = content["evaluations"]
    dice = {m["run"]: m["mean"] for m in validation["means"] if (m["metric"], m["structure"]) == ("Dice", "mean")}
    assert dice == pytest.approx(dict.fromkeys(TRAINERS, 0.5))
    assert unseen["name"] == "held-out"
    assert unseen["cases"] == ["phantom_005"]
    # the stand-in predicts the references themselves
    results = [f"{trainer}: Dice 1.000, 5.0 s per epoch" for trainer in TRAINERS]
    assert said[-3:] == [*results, f"Report: {folder / 'report.html'}"]
    assert "says nothing about the quality" in (folder / "report.html").read_text()


def test_commands_are_those_that_ran_and_the_comparison(written: tuple[Path, list[str]], nnunet: FakeNnunet) -> None:
    folder, _ = written
    text = (folder / "report.md").read_text()
    export, _, _, *lines = text.partition("```bash\n")[2].partition("\n```")[0].splitlines()
    assert export == f"export nnUNet_raw={folder / 'nnUNet_raw'}"
    assert lines[:-1] == [shlex.join(command) for command in nnunet.commands]
    assert lines[-1].startswith("nnunet-ext compare -m ")
    assert lines[-1].endswith(f" -ref {folder / 'nnUNet_raw/Dataset990_CTPhantom/labelsTs'} -o {folder}")
