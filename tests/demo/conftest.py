"""A stand-in for nnU-Net's commands that leaves the files which they would leave."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch

from nnunet_ext.demo import phantom, steps
from nnunet_ext.demo.children import Child
from nnunet_ext.demo.phantom import PhantomSpec

EPOCHS = 3


class FakeNnunet:
    """Runner that notes the commands; `fail` maps a command's name to an exception that it raises first."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, ...]] = []
        self.fail: dict[str, BaseException] = {}
        self.configurations = ["2d", "3d_fullres"]

    @property
    def names(self) -> list[str]:
        """The commands without their arguments; a continued training ends in --c."""
        return [command[0] + (" --c" if "--c" in command else "") for command in self.commands]

    def __call__(self, child: Child, on_text: Callable[[str], None]) -> None:
        """Do what the command does."""
        self.commands.append(child.command)
        name, *arguments = child.command
        if name in self.fail:
            raise self.fail.pop(name)
        options = dict(pairwise(arguments))
        folders = {
            key: Path(child.environment[f"nnUNet_{key}"]) for key in ("raw", "preprocessed", "results")
        }
        getattr(self, name)(folders, arguments, options)
        on_text(f"Epoch 0 \ntrain_loss -0.25 \nEpoch {EPOCHS - 1} \n")

    def nnUNetv2_plan_and_preprocess(self, folders: Any, _: Any, options: Any) -> None:  # noqa: N802
        raw = next(folders["raw"].glob("Dataset*"))
        folder = folders["preprocessed"] / raw.name
        (folder / "data").mkdir(parents=True)
        configuration = {
            "data_identifier": "data",
            "patch_size": [8, 8, 8],
            "batch_size": 2,
            "spacing": [1, 1, 1],
        }
        plans = {
            "dataset_name": raw.name,
            "configurations": dict.fromkeys(self.configurations, configuration),
        }
        (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
        for label in (raw / "labelsTr").iterdir():
            case = label.name.partition(".")[0]
            (folder / "data" / f"{case}.pkl").write_bytes(pickle.dumps({}))
            for end in ("", "_seg"):
                blosc2.asarray(np.zeros(8), urlpath=str(folder / "data" / f"{case}{end}.b2nd"))

    def nnUNetv2_train(self, folders: Any, arguments: Any, options: Any) -> None:  # noqa: N802
        raw = next(folders["raw"].glob("Dataset*"))
        model = folders["results"] / raw.name / f"{options['-tr']}__nnUNetPlans__{arguments[1]}"
        (model / "fold_0" / "validation").mkdir(parents=True, exist_ok=True)
        values = [0.5] * EPOCHS
        log = {key: values for key in ("train_losses", "val_losses", "mean_fg_dice")}
        times = {"epoch_start_timestamps": [0.0, 10.0, 20.0], "epoch_end_timestamps": [4.0, 15.0, 26.0]}
        torch.save({"logging": log | times}, model / "fold_0" / "checkpoint_final.pth")
        shutil.copy(folders["preprocessed"] / raw.name / "nnUNetPlans.json", model / "plans.json")
        shutil.copy(raw / "dataset.json", model / "dataset.json")
        self._validate(model / "fold_0" / "validation", sorted((raw / "labelsTr").iterdir())[0])

    def nnUNetv2_predict(self, folders: Any, _: Any, options: Any) -> None:  # noqa: N802
        output = Path(options["-o"])
        shutil.copytree(Path(options["-i"]).parent / "labelsTs", output)

    def _validate(self, folder: Path, reference: Path) -> None:
        """One case, of which every structure is half found."""
        shutil.copy(reference, folder)
        labels = json.loads((reference.parents[1] / "dataset.json").read_text())["labels"]
        half = {"Dice": 0.5, "IoU": 1 / 3, "TP": 10, "FP": 10, "FN": 10}
        metrics = {str(label): half for label in labels.values() if label != 0}
        case = {"prediction_file": str(folder / reference.name), "metrics": metrics}
        (folder / "summary.json").write_text(json.dumps({"metric_per_case": [case]}))


@pytest.fixture
def nnunet(monkeypatch: pytest.MonkeyPatch) -> FakeNnunet:
    """The stand-in, and a phantom of few and coarse scans."""
    few = PhantomSpec(n_training=5, n_test=1, spacing=(9.0, 9.0, 9.0))
    monkeypatch.setattr(steps.phantom, "PhantomSpec", lambda: few)
    assert phantom.PhantomSpec() is few
    return FakeNnunet()
