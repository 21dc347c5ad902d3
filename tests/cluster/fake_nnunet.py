"""A stand-in for nnU-Net's commands and `nnunet-ext compare`: leaves at once the files that they would leave.

Called by scripts of their names. ``FAKE`` holds what trainings do besides, as JSON: name of a trainer or fold_N ->

    "crash"                         fail with an error
    "full"                          fail for want of disk
    "nan"                           have no number as loss
    "kill", "kill always"           are killed after the first checkpoint, or before it each time
    "slow", "deaf"                  do not end; save when asked, or do not
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import zipfile
from itertools import pairwise
from pathlib import Path

CASES = [f"case{number}" for number in range(10)]
_NETWORK = {"network_class_name": "gone.Network", "arch_kwargs": {}, "_kw_requires_import": []}
_PLANS = {"ExperimentPlanner": "nnUNetPlans", "HalfWidthPlanner": "nnUNetHalfWidthPlans"}


def main(arguments: list[str]) -> None:
    name, *rest = arguments
    options = dict(pairwise(rest))
    globals()[name.replace("-", "_")](rest, options)


def _folder(variable: str, dataset: str) -> Path:
    number = int(dataset) if dataset.isdecimal() else int(dataset[7:10])
    return Path(os.environ[variable]) / f"Dataset{number:03d}_Fake"


def nnUNetv2_extract_fingerprint(_: list[str], options: dict[str, str]) -> None:  # noqa: N802
    folder = _folder("nnUNet_preprocessed", options["-d"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_fingerprint.json").write_text("{}")


def nnUNetv2_plan_experiment(_: list[str], options: dict[str, str]) -> None:  # noqa: N802
    folder = _folder("nnUNet_preprocessed", options["-d"])
    busy = folder / "planning"
    busy.mkdir()  # fails where another planner is at work
    time.sleep(0.3)
    plain = {"data_identifier": "data", "patch_size": [8, 8, 8], "batch_size": 2, "spacing": [1, 1, 1]}
    known = {
        "3d_fullres": {**plain, "architecture": _NETWORK},
        "3d_lowres": {**plain, "data_identifier": "low", "architecture": _NETWORK, "next_stage": "3d_cascade_fullres"},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    plans = {"dataset_name": folder.name, "plans_name": _PLANS[options["-pl"]], "configurations": known}
    (folder / f"{plans['plans_name']}.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text((_folder("nnUNet_raw", options["-d"]) / "dataset.json").read_text())
    busy.rmdir()


def nnUNetv2_preprocess(words: list[str], options: dict[str, str]) -> None:  # noqa: N802
    folder = _folder("nnUNet_preprocessed", options["-d"])
    names = words[words.index("-c") + 1 : words.index("-np")]
    for data in ["low" if name == "3d_lowres" else "data" for name in names]:
        (folder / data).mkdir(exist_ok=True)
        with (folder / data / "made.txt").open("a") as stream:
            stream.write("preprocessed\n")
        for case in CASES:
            for end in (".b2nd", "_seg.b2nd", ".pkl"):
                (folder / data / f"{case}{end}").touch()
    (folder / "gt_segmentations").mkdir(exist_ok=True)
    for case in CASES:
        (folder / "gt_segmentations" / f"{case}.nii.gz").touch()


def nnUNetv2_train(words: list[str], options: dict[str, str]) -> None:  # noqa: N802
    dataset, configuration, fold, *_ = words
    model = _folder("nnUNet_results", dataset) / f"{options['-tr']}__{options['-p']}__{configuration}"
    folder = model / f"fold_{fold}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "calls.txt").open("a") as stream:
        stream.write(" ".join(words) + "\n")
    asked = json.loads(os.environ.get("FAKE", "{}"))
    does = asked.get(f"fold_{fold}", asked.get(options["-tr"], ""))
    if does == "crash":
        print("Traceback (most recent call last):\nValueError: the planted fault")
        raise SystemExit(1)
    if does == "full":
        print("OSError: [Errno 28] No space left on device: 'x'\nexiting")
        raise SystemExit(1)
    if "--val" not in words:
        _train(folder, does)
    (folder / "validation").mkdir(exist_ok=True)
    (folder / "validation" / "summary.json").write_text("{}")
    if configuration == "3d_lowres":
        told = model / "predicted_next_stage" / "3d_cascade_fullres"
        told.mkdir(parents=True, exist_ok=True)
        splits = json.loads((_folder("nnUNet_preprocessed", dataset) / "splits_final.json").read_text())
        for case in splits[int(fold)]["val"]:
            (told / f"{case}.b2nd").touch()


def _train(folder: Path, does: str) -> None:
    (folder / "debug.json").write_text(json.dumps({"num_epochs": "3"}))
    log = folder / f"training_log_{time.time_ns()}.txt"
    loss = "nan" if does == "nan" else "-0.25"
    for epoch in range(int("--c" in sys.argv), 3):
        with log.open("a") as stream:
            stream.write(f"now: \nnow: Epoch {epoch} \nnow: train_loss {loss} \nnow: Epoch time: 60.0 s \n")
        if does == "slow":
            while not (folder / "save_checkpoint").exists():
                time.sleep(0.05)
        if does == "kill always":
            os.kill(os.getpid(), signal.SIGKILL)
        while does == "deaf":
            time.sleep(0.05)
        _save(folder / "checkpoint_latest.pth")
        (folder / "save_checkpoint").unlink(missing_ok=True)
        while does == "slow":
            time.sleep(0.05)
        if does == "kill" and "--c" not in sys.argv:
            os.kill(os.getpid(), signal.SIGKILL)
    with log.open("a") as stream:
        stream.write("now: Training done. \n")
    (folder / "checkpoint_latest.pth").unlink()
    _save(folder / "checkpoint_final.pth")


def _save(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", "weights")


def nnUNetv2_find_best_configuration(words: list[str], _: dict[str, str]) -> None:  # noqa: N802
    text = " ".join(words)
    (_folder("nnUNet_results", words[0]) / "inference_instructions.txt").write_text(text)


def nnunet_ext(words: list[str], options: dict[str, str]) -> None:
    assert words[0] == "compare"
    Path(options["-o"]).mkdir(parents=True)
    (Path(options["-o"]) / "report.json").write_text(json.dumps(words))
