"""A stand-in for nnU-Net's commands that leaves the files which they would leave."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.utilities import utils

from nnunet_ext.demo import commands, phantom
from nnunet_ext.demo.phantom import PhantomSpec, write_dataset
from nnunet_ext.demo.settings import Demo

EPOCHS = 3


class FakeNnunet:
    """Runs commands and notes them; the one named by `interrupted_at` is interrupted at its start."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.interrupted_at = ""
        self.configurations = ["2d", "3d_fullres"]

    @property
    def names(self) -> list[str]:
        """The commands without their arguments; a continued training ends in --c."""
        return [command[0] + (" --c" if "--c" in command else "") for command in self.commands]

    def __call__(self, command: list[str], log: Path, demo: Demo, on_text: Callable[[str], None]) -> None:
        """Do what the command does."""
        self.commands.append(command)
        name, *arguments = command
        if name == self.interrupted_at:
            raise KeyboardInterrupt
        getattr(self, name)(demo, dict(pairwise(arguments)))
        on_text(f"Epoch 0 \ntrain_loss -0.25 \nEpoch {EPOCHS - 1} \n")

    def nnUNetv2_plan_and_preprocess(self, demo: Demo, _: Any) -> None:  # noqa: N802
        folder = demo.preprocessed
        (folder / "data").mkdir(parents=True)
        shutil.copytree(demo.data / "labelsTr", folder / "gt_segmentations")
        network = {"network_class_name": "gone.Network", "arch_kwargs": {}, "_kw_requires_import": []}
        configuration = {"data_identifier": "data", "patch_size": [8, 8, 8], "batch_size": 2, "spacing": [1, 1, 1]}
        known = {name: {**configuration, "architecture": network} for name in self.configurations}
        plans = {"dataset_name": demo.dataset, "plans_name": "nnUNetPlans", "configurations": known}
        (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
        for case in demo.cases("Tr"):
            (folder / "data" / f"{case}.pkl").write_bytes(pickle.dumps({}))
            for end in ("", "_seg"):
                blosc2.asarray(np.zeros(8), urlpath=str(folder / "data" / f"{case}{end}.b2nd"))

    def nnUNetv2_train(self, demo: Demo, options: Any) -> None:  # noqa: N802
        (model,) = (demo.model(name) for name in demo.trainers if demo.scheduled(name) == options["-tr"])
        (model / "fold_0" / "validation").mkdir(parents=True)
        log = {key: [0.5] * EPOCHS for key in ("train_losses", "val_losses", "mean_fg_dice")}
        times = {"epoch_start_timestamps": [0.0, 10.0, 20.0], "epoch_end_timestamps": [4.0, 15.0, 26.0]}
        torch.save({"logging": log | times}, model / "fold_0" / "checkpoint_final.pth")
        shutil.copy(demo.preprocessed / "nnUNetPlans.json", model / "plans.json")
        shutil.copy(demo.data / "dataset.json", model / "dataset.json")
        reference = sorted((demo.data / "labelsTr").iterdir())[0]
        shutil.copy(reference, model / "fold_0" / "validation")
        half = {"Dice": 0.5, "IoU": 1 / 3, "TP": 10, "FP": 10, "FN": 10}  # of every structure
        metrics = {str(label): half for label in phantom.LABELS.values() if label != 0}
        case = {"prediction_file": str(model / "fold_0" / "validation" / reference.name), "metrics": metrics}
        summary = json.dumps({"metric_per_case": [case]})
        (model / "fold_0" / "validation" / "summary.json").write_text(summary)

    def nnUNetv2_predict(self, demo: Demo, options: Any) -> None:  # noqa: N802
        shutil.copytree(demo.data / "labelsTs", options["-o"])


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    """One training on the phantom, in a folder of this test."""
    return Demo(
        root=tmp_path / "demo",
        raw=None,
        trainers=("nnUNetTrainer",),
        schedule="3epochs_2iters",
        configuration="3d_fullres",
        device="cpu",
    )


@pytest.fixture(scope="session")
def few_scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom of few and coarse scans."""
    folder = tmp_path_factory.mktemp("phantom") / phantom.NAME
    write_dataset(folder, PhantomSpec(n_training=5, n_test=1, spacing=(9.0, 9.0, 9.0)))
    return folder


@pytest.fixture(scope="module")
def nnunet(few_scans: Path) -> Any:
    """The stand-in, and a phantom that is only copied."""
    with pytest.MonkeyPatch.context() as patch:
        fake = FakeNnunet()
        patch.setattr(commands, "run", fake)
        patch.setattr(phantom, "write_dataset", lambda folder, *_: shutil.copytree(few_scans, folder))
        yield fake


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nnU-Net list files in this process."""
    monkeypatch.setattr(utils, "Pool", ThreadPool)
