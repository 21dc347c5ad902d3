"""A tiny setting of plans, a machine to measure it on, and a planned data set; fixtures for all tests."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from nnunet_ext.benchmark.machine import Machine
from nnunet_ext.nnunet.patch_plans import narrow
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.source import Source

FEATURES = [4, 8, 8]


def tiny(patch: tuple[int, ...] = (16, 16, 16), **options: Any) -> Setting:
    """Plan as the command does, then make the network narrow."""
    return narrow(Source(patch=patch, **options).setting(), FEATURES)


@pytest.fixture
def setting() -> Setting:
    """3D, patch 16x16x16, batch 2, one channel, three classes, three stages of 4, 8 and 8 features."""
    return tiny()


@pytest.fixture
def machine() -> Machine:
    """The CPU in float32."""
    return Machine("cpu", "float32")


@pytest.fixture
def planned_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a preprocessed data set 7 of two channels and two classes, whose median image is 16x24x40."""
    folder = tmp_path / "preprocessed" / "Dataset007_Tiny"
    folder.mkdir(parents=True)
    dataset = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "one": 1}}
    plans = deepcopy(dict(tiny().plans))
    plans |= {"plans_name": "nnUNetPlans", "original_median_shape_after_transp": [16, 24, 40]}
    volume = plans["configurations"]["3d_fullres"]
    volume["median_image_size_in_voxels"] = [16.0, 24.0, 40.0]
    plane = dict(tiny((16, 16)).plans["configurations"]["2d"], median_image_size_in_voxels=[24.0, 40.0])
    plans["configurations"] |= {"2d": plane, "3d_half": {"inherits_from": "3d_fullres", "batch_size": 1}}
    (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans), encoding="utf-8")
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    return folder
