"""``nnunet-ext advise``: what it prints of a planted result, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunet_ext import cli
from nnunet_ext.advise.records import Advice, Row
from tests.advise.test_choice import OWN, advice, row

LONG = row(
    "nnUNetTrainerActivationCheckpointing",
    "ActivationCheckpointingResEncPlanner",
    patch=192,
    gb=100.4,
    parameters=102_400_000,
    step_operations=123_456,
    case_operations=123_456,
)
BROKEN = Row(trainer="nnUNetTrainerPartiallyInvertible", planner="PartiallyInvertibleUNetPlanner", reason="no patch")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Advice:
    found = advice("context", OWN, LONG, row("Me", standard_patch=(192, 224, 192)), BROKEN)
    monkeypatch.setattr("nnunet_ext.advise.advise.advise", lambda *args, **options: found)
    monkeypatch.setenv("COLUMNS", "80")
    return found


def test_table_and_commands_fit_80_columns_words_whole(planted: Advice, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["advise", "-d", "4", "--gpu", "8"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("trainer ") == 1  # one table
    for word in ("ActivationCheckpointing", "...ResEncPlanner", "PartiallyInvertible", "100.4 !", "192x192x192"):
        assert word in out.replace("\n", " ").split() or word in out
    assert "nnUNetTrainerPartiallyInvertible with PartiallyInvertibleUNetPlanner: no" in out
    assert "\nTake Own with OwnPlanner.\n" in out
    pasted = out[out.index("nnUNetv2_plan_experiment") :].replace(" \\\n    ", " ").splitlines()
    assert pasted[0] == (
        "nnUNetv2_plan_experiment -d 4 -pl OwnPlanner -gpu_memory_target 8 -overwrite_plans_name OwnPlans_8G"
    )
    assert [line.split()[0] for line in pasted[1:]] == ["nnUNetv2_preprocess", "nnUNetv2_train", "nnUNetv2_predict"]


def test_json_holds_every_row_and_the_choice(planted: Advice, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["advise", "-d", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["trainer"] for r in found["rows"]] == [r.trainer for r in planted.rows]
    assert found["recommended"]["trainer"] == "Own"
    assert len(found["recommended"]["commands"]) == 4
    assert found["rows"][1]["coverage"] == pytest.approx(0.65**3)
    assert found["rows"][-1]["reason"] == "no patch"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set whose fingerprint has not been extracted."""
    for name in ("raw", "preprocessed"):
        (tmp_path / name / "Dataset004_Acme").mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}, "numTraining": 1, "file_ending": ".x"}
    (tmp_path / "raw" / "Dataset004_Acme" / "dataset.json").write_text(json.dumps(content))
    return tmp_path / "preprocessed" / "Dataset004_Acme"


FLAT = {"spacings": [[1, 1, 1]], "shapes_after_crop": [[1, 64, 64]]}


@pytest.mark.parametrize(
    ("fingerprint", "options", "said"),
    [
        (None, [], "nnUNetv2_extract_fingerprint -d 4 makes it"),
        ({"spacings": [], "shapes_after_crop": []}, [], "three positive numbers each: extract it again"),
        (FLAT, ["-c", "3d_fullres"], "the images of Dataset004_Acme are 2D, got -c 3d_fullres"),
        (FLAT, ["-c", "3d_cascade_fullres"], "-c must be 2d, 3d_fullres, 3d_lowres"),
        (FLAT, ["--gpu", "0"], "--gpu must be the GB of the card"),
        (FLAT, ["--gpu", "nan"], "--gpu must be the GB of the card"),
    ],
)
def test_mistakes_are_one_line(
    fingerprint: object, options: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if fingerprint is not None:
        (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    assert cli.main(["advise", "-d", "4", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_an_unknown_data_set_is_told_how_to_become_known(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["advise", "-d", "5"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "nnUNetv2_extract_fingerprint -d 5" in line
