"""A data set, and commands in the place of nnU-Net's that leave at once what those would leave."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from nnunet_ext.cluster.request import FOLDERS, CrossValidation, Method
from tests.cluster import fake_nnunet

DATASET = "Dataset801_Fake"
Asked = Callable[..., CrossValidation]


@pytest.fixture
def fake(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Commands of this process, and of all that it starts, are the stand-ins; tells them what trainings do."""
    for name in FOLDERS:  # tests of others set them
        monkeypatch.delenv(name, raising=False)
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(root)]))
    folder = tmp_path / "commands"
    folder.mkdir()
    for name in dir(fake_nnunet):
        if name.startswith(("nnUNetv2_", "nnunet_ext")):
            command = folder / name.replace("nnunet_ext", "nnunet-ext")
            command.write_text(
                f"#!{sys.executable}\nimport sys\nfrom tests.cluster.fake_nnunet import main\n"
                f"main([{name!r}, *sys.argv[1:]])\n"
            )
            command.chmod(0o755)
    (site / "sitecustomize.py").write_text(
        f"import nnunet_ext.console as console\nconsole._find = lambda name: {str(folder)!r} + '/' + name\n"
    )
    monkeypatch.setattr("nnunet_ext.console._find", lambda name: str(folder / name))
    monkeypatch.setattr("nnunet_ext.cluster.training._ENDING", 0.1)
    monkeypatch.setattr("nnunet_ext.cluster.work._LOOK", 0.05)
    return lambda does: monkeypatch.setenv("FAKE", json.dumps(does))


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    """What is asked for, of a raw data set that is there: ``asked(folds=(0,))``."""
    raw = tmp_path / "raw" / DATASET
    (raw / "imagesTr").mkdir(parents=True)
    for case in fake_nnunet.CASES:
        (raw / "imagesTr" / f"{case}_0000.nii.gz").touch()
    content = {"labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}}
    (raw / "dataset.json").write_text(json.dumps(content))

    number = count()

    def make(**options: Any) -> CrossValidation:
        defaults: dict[str, Any] = {
            "datasets": (DATASET,),
            "methods": (Method(trainer="nnUNetTrainer_3epochs", plans="nnUNetPlans"),),
            "configurations": ("3d_fullres",),
            "folds": None,
            "device": "cpu",
            "gpus": 0,
            "npz": False,
            "raw": tmp_path / "raw",
            "preprocessed": tmp_path / "preprocessed",
            "results": tmp_path / "results",
            "output": tmp_path / f"output{next(number)}",
        }
        found = CrossValidation(**(defaults | options))
        found.open()
        return found

    return make
