"""A data set of which only a fingerprint is there, planned for real: no images, nothing written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nnunet_ext import aims, registry
from nnunet_ext.advise import advise as module
from nnunet_ext.advise.advise import advise
from nnunet_ext.advise.choice import choose
from nnunet_ext.advise.data_set import DataSet, planners_in
from nnunet_ext.advise.records import DEFAULT_PLANNER
from nnunet_ext.errors import UsageError
from nnunet_ext.memory.tracker import GIB

CHECKPOINTING = "nnUNetTrainerActivationCheckpointing"
NARROW = "nnUNetTrainerHalfWidthBN"
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
CASES = 2000
MULTIPLE = {"channel_names": {"0": "CT", "1": "MRI"}}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write fingerprint and dataset.json of data set 4: ``write(shape, spacing)``; give its folder."""
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))

    def written(shape: list[int], spacing: list[float], cases: int = CASES) -> Path:
        folders = [tmp_path / name / "Dataset004_Acme" for name in ("raw", "preprocessed")]
        for folder in folders:
            folder.mkdir(parents=True)
        content = {**MULTIPLE, **REGIONS, "numTraining": cases, "file_ending": ".nii.gz"}
        (folders[0] / "dataset.json").write_text(json.dumps(content))
        fingerprint = {
            "spacings": [spacing] * cases,
            "shapes_after_crop": [shape] * cases,
            "median_relative_size_after_cropping": 0.5,
            "foreground_intensity_properties_per_channel": {},
        }
        (folders[1] / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
        return folders[1]

    return written


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two planners: the others are tested where they live."""
    jobs = [("ExperimentPlanner", (aims.DEFAULT, NARROW)), ("ActivationCheckpointingPlanner", (CHECKPOINTING,))]
    monkeypatch.setattr(module, "_jobs", lambda aim, everything: iter(jobs))


@pytest.mark.usefixtures("few")
def test_flat_images_of_two_channels_and_regions_stay_with_default(write: Any, tmp_path: Path) -> None:
    folder = write([1, 30, 28], [999.0, 1.0, 1.0])
    progress: list[tuple[int, int, str]] = []
    found = advise("4", "context", gpu=4, on_progress=lambda *seen: progress.append(seen))
    assert (found.configuration, found.default.patch, found.default.image) == ("2d", (32, 28), (30, 28))
    assert [row.coverage for row in found.rows] == [1.0] * 3
    rows = {row.trainer: row for row in found.rows}
    assert rows[CHECKPOINTING].batch == found.default.batch > 2
    assert rows[CHECKPOINTING].expected < found.default.expected < 4 * GIB
    assert [rows[name].has_own_weights for name in (aims.DEFAULT, CHECKPOINTING, NARROW)] == [True, True, False]
    assert rows[NARROW].parameters == pytest.approx(found.default.parameters / 4, rel=0.02)
    assert found.step(rows[CHECKPOINTING]) == pytest.approx(4 / 3, abs=0.04)
    assert choose(found).row.is_default
    assert choose(replace(found, aim="speed")).row.trainer == NARROW
    assert progress[-1] == (2, 2, "ActivationCheckpointingPlanner")
    assert [path.name for path in folder.iterdir()] == ["dataset_fingerprint.json"]
    # The planner of the printed command comes to the same, in the folder of nnU-Net's variables.
    DataSet.find("4").write(tmp_path / "there")
    with planners_in(tmp_path / "there"):
        planner = registry.resolve("planners", "ActivationCheckpointingPlanner")("Dataset004_Acme", 4)
        plan = planner.get_plans_for_configuration([1.0, 1.0], [30, 28], "2d", 30 * 28 * CASES, {})
    assert (rows[CHECKPOINTING].patch, rows[CHECKPOINTING].batch) == (tuple(plan["patch_size"]), plan["batch_size"])
    assert rows[CHECKPOINTING].expected / GIB == pytest.approx(plan["memory"]["expected_GB"], abs=0.001)


def test_a_configuration_that_nnunet_does_not_plan_is_one_sentence(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_jobs", lambda aim, everything: iter([("ExperimentPlanner", (aims.DEFAULT,))]))
    write([40, 64, 60], [1.0, 1.0, 1.0])
    with pytest.raises(UsageError, match=r"3d_lowres of Dataset004_Acme .* \(plans no 3d_lowres .*\): give another -c"):
        advise("4", "context", gpu=8, configuration="3d_lowres")


@pytest.mark.parametrize("aim", aims.AIMS)
def test_every_method_takes_part_with_its_planners(aim: aims.Aim) -> None:
    jobs = [(planner, trainer) for planner, trainers in module._jobs(aim, True) for trainer in trainers]
    assert len(jobs) == len(set(jobs))
    trainers = {trainer for _, trainer in jobs}
    cascades = {name for name in aims.BY_TRAINER if name.startswith("nnUNetTrainerMeCascade")}
    assert trainers >= set(aims.BY_TRAINER) - (cascades if aim == "memory" else set())
    if aim != "memory":
        assert {planner for planner, _ in jobs} >= set(registry.names("planners"))
    rivals = [(DEFAULT_PLANNER, name) for name, method in aims.BY_TRAINER.items() if method.standing == "rival"]
    assert set(rivals) <= set(jobs)
    few = [trainer for _, trainers in module._jobs(aim, False) for trainer in trainers]
    assert all((method := aims.of(name)) is None or method.standing != "research" for name in few)
