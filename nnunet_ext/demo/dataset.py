"""A user's data set in nnU-Net's raw format, linked into the demo's folder with two scans kept unseen."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from nnunet_ext.demo.settings import Demo
from nnunet_ext.doctor.case import Case, look
from nnunet_ext.doctor.description import describe
from nnunet_ext.doctor.raw_dataset import about_cases, default_processes, list_cases, rules
from nnunet_ext.errors import UsageError
from nnunet_ext.files import whole_folder
from nnunet_ext.nnunet.datasets import number_of, read_dataset

N_UNSEEN = 2
_MIN_TRAINING = 5  # nnU-Net makes five folds


@dataclass(frozen=True, kw_only=True)
class RawDataset:
    """What `--raw` names, as far as the demo uses it.

    Args:
        folder: DatasetXXX_Name.
        description: Content of its dataset.json.
        training: Cases to train on.
        unseen: Cases to predict.
    """

    folder: Path
    description: dict[str, Any]
    training: tuple[Case, ...]
    unseen: tuple[Case, ...]


def read_raw(folder: Path) -> RawDataset:
    """Read and check a data set; unseen are two labelled scans of imagesTs, else two held out of imagesTr.

    Raises:
        UsageError: it is not in nnU-Net's raw format, or has too few cases.
    """
    if number_of(folder.name) is None:
        raise UsageError(f"--raw needs a folder called DatasetXXX_Name (XXX: digits), got {folder}: rename it.")
    if not folder.is_dir():
        raise UsageError(f"--raw needs an existing folder, got {folder}: correct the path.")
    description = _read_description(folder)
    cases, found = list_cases(folder, description)
    if not cases:
        wrong = next(finding for finding in found if finding.level == "failure")
        raise UsageError(f"--raw needs a data set with cases, {folder} {wrong.detail}: {wrong.cure}.")
    unlabelled = [case.label for case in cases if case.label is not None and not case.label.is_file()]
    if unlabelled:
        raise UsageError(
            f"--raw needs a label for every training case, {unlabelled[0].parent} has no "
            f"{unlabelled[0].name} ({len(unlabelled)} missing): add it or remove the image."
        )
    test = _test_cases(folder, str(description["file_ending"]))
    needed = _MIN_TRAINING if test else _MIN_TRAINING + N_UNSEEN
    if len(cases) < needed:
        held_out = "" if test else f", and {N_UNSEEN} are held out to be predicted"
        raise UsageError(
            f"--raw needs at least {needed} training cases (nnU-Net makes five folds{held_out}), "
            f"{folder} has {len(cases)}: add some."
        )
    if test:
        return RawDataset(folder=folder, description=description, training=tuple(cases), unseen=tuple(test[:N_UNSEEN]))
    return RawDataset(
        folder=folder, description=description, training=tuple(cases[:-N_UNSEEN]), unseen=tuple(cases[-N_UNSEEN:])
    )


def check(raw: RawDataset, on_progress: Callable[[int, int], None]) -> None:
    """Read all cases, as `nnunet-ext doctor --dataset` does.

    Raises:
        UsageError: one would spoil a training.
    """
    _, findings = describe(raw.folder / "dataset.json")
    cases = (*raw.training, *raw.unseen)
    findings += about_cases(raw.description, cases, default_processes(), on_progress)
    failures = [found for found in findings if found.level == "failure"]
    if failures:
        first, command = failures[0], f"nnunet-ext doctor --dataset {shlex.quote(str(raw.folder))}"
        raise UsageError(
            f"--raw needs a data set without faults, {first.subject} {first.detail}: {first.cure} "
            f"(failures: {len(failures)}; `{command}` shows all)."
        )


def _read_description(folder: Path) -> dict[str, Any]:
    needed = ("channel_names", "labels", "file_ending")
    try:
        return read_dataset(folder / "dataset.json", "repair or add it", needed)
    except UsageError as error:
        raise UsageError(f"--raw needs a dataset.json that nnU-Net can use: {error}") from error


def _test_cases(folder: Path, ending: str) -> list[Case]:
    """Cases of imagesTs that have a label in labelsTs."""
    pattern = re.compile(r"([^.].*)_\d{4}" + re.escape(ending))
    found: dict[str, list[Path]] = {}
    for path in sorted((folder / "imagesTs").iterdir()) if (folder / "imagesTs").is_dir() else ():
        if match := pattern.fullmatch(path.name):
            found.setdefault(match[1], []).append(path)
    labels = {name: folder / "labelsTs" / f"{name}{ending}" for name in found}
    return [Case(name, tuple(found[name]), labels[name]) for name in sorted(found) if labels[name].is_file()]


def link(raw: RawDataset, target: Path) -> None:
    """Link the files of `raw` (copy them, where links are not allowed) into the new data set `target`.

    Raises:
        UsageError: `target` can't be written.
    """
    description = raw.description | {"numTraining": len(raw.training)}
    description.pop("dataset", None)  # all lie in imagesTr and labelsTr now
    ending = str(description["file_ending"])
    with whole_folder(target, replace=True) as partial:
        for part, cases in (("Tr", raw.training), ("Ts", raw.unseen)):
            images, labels = partial / f"images{part}", partial / f"labels{part}"
            images.mkdir()
            labels.mkdir()
            for case in cases:
                for channel, path in enumerate(case.images):
                    _link(path, images / f"{case.name}_{channel:04d}{ending}")
                # Readers of .tif look for the spacing there.
                _link(_beside(case.images[0], len(f"_0000{ending}")), images / f"{case.name}.json")
                if case.label is not None:
                    _link(case.label, labels / f"{case.name}{ending}")
                    _link(_beside(case.label, len(ending)), labels / f"{case.name}.json")
        (partial / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def are_predicted(demo: Demo, folder: Path) -> bool:
    """Whether `folder` has all unseen cases: whole, of their images' shapes, with labels of the data set."""
    description, ending = _read_description(demo.data), demo.file_ending
    for case in demo.cases("Ts"):
        images = tuple(sorted((demo.data / "imagesTs").glob(f"{escape(case)}_????{ending}")))
        seen = look((Case(case, images, folder / f"{case}{ending}"), rules(description, images[0])))
        if any(found.level == "failure" for found in seen.findings):
            return False
    return True


def _beside(path: Path, end: int) -> Path:
    return path.with_name(f"{path.name[:-end]}.json")


def _link(path: Path, target: Path) -> None:
    if not path.is_file():
        return
    try:
        target.symlink_to(path.resolve())
    except (OSError, NotImplementedError):  # Windows without the right, file systems without links
        shutil.copyfile(path, target)
