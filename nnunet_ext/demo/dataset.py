"""A user's data set in nnU-Net's raw format, linked into the demo's folder with two scans kept unseen."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ext.errors import UsageError
from nnunet_ext.files import whole_folder

N_UNSEEN = 2
_MIN_TRAINING = 5  # nnU-Net makes five folds


@dataclass(frozen=True)
class RawDataset:
    """What `--raw` names, as far as the demo uses it.

    Args:
        folder: DatasetXXX_Name.
        description: content of its dataset.json.
        training: names of the cases to train on.
        unseen: names of the cases to predict.
        unseen_part: "Ts" where they lie in imagesTs and labelsTs, "Tr" where they were held out.
    """

    folder: Path
    description: dict[str, Any]
    training: tuple[str, ...]
    unseen: tuple[str, ...]
    unseen_part: str


def read_raw(folder: Path) -> RawDataset:
    """Read and check a data set; unseen are two labelled scans of imagesTs, else two held out of imagesTr.

    Raises:
        UsageError: it is not in nnU-Net's raw format, or has too few cases.
    """
    if re.fullmatch(r"Dataset\d{3}_\w[\w-]*", folder.name) is None:
        raise UsageError(
            f"--raw needs a folder called DatasetXXX_Name (XXX: digits), got {folder}: rename it."
        )
    if not folder.is_dir():
        raise UsageError(f"--raw needs an existing folder, got {folder}: correct the path.")
    description = _read_description(folder)
    for part in ("imagesTr", "labelsTr"):
        if not (folder / part).is_dir():
            raise UsageError(f"--raw needs a folder {part} in the data set, {folder} has none: add it.")
    ending = str(description["file_ending"])
    cases = _cases(folder / "imagesTr", ending)
    unlabelled = [case for case in cases if not (folder / "labelsTr" / f"{case}{ending}").is_file()]
    if unlabelled:
        raise UsageError(
            f"--raw needs a label for every training case, {folder / 'labelsTr'} has no "
            f"{unlabelled[0]}{ending} ({len(unlabelled)} missing): add it or remove the image."
        )
    test = _cases(folder / "imagesTs", ending)
    test = [case for case in test if (folder / "labelsTs" / f"{case}{ending}").is_file()]
    needed = _MIN_TRAINING if test else _MIN_TRAINING + N_UNSEEN
    if len(cases) < needed:
        held_out = "" if test else f", and {N_UNSEEN} are held out to be predicted"
        raise UsageError(
            f"--raw needs at least {needed} training cases (nnU-Net makes five folds{held_out}), "
            f"{folder} has {len(cases)}: add some."
        )
    if test:
        return RawDataset(folder, description, tuple(cases), tuple(test[:N_UNSEEN]), "Ts")
    return RawDataset(folder, description, tuple(cases[:-N_UNSEEN]), tuple(cases[-N_UNSEEN:]), "Tr")


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"--raw needs a dataset.json in the data set, {folder} has none: add it.") from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--raw needs a readable dataset.json, {path} is not ({error}): repair it."
        ) from error
    required = ("channel_names", "labels", "file_ending")
    missing = [key for key in required if not isinstance(description, dict) or key not in description]
    if missing:
        names = ", ".join(missing)
        raise UsageError(f"--raw needs {', '.join(required)} in {path}, it lacks {names}: add them.")
    if "dataset" in description:
        raise UsageError(
            f"--raw needs the cases in imagesTr and labelsTr, {path} lists them under 'dataset': "
            "copy or link the files there and remove that key."
        )
    return dict(description)


def _cases(folder: Path, ending: str) -> list[str]:
    """Names of the cases in a folder of images, <case>_<four digits of the channel><ending>."""
    pattern = re.compile(r"(.+)_\d{4}" + re.escape(ending))
    matches = [pattern.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted({match[1] for match in matches if match is not None})


def link(raw: RawDataset, target: Path) -> None:
    """Link the files of `raw` (copy them, where links are not allowed) into the new data set `target`.

    Raises:
        UsageError: `target` can't be written.
    """
    description = raw.description | {"numTraining": len(raw.training)}
    with whole_folder(target, replace=True) as partial:
        for cases, source_part, part in ((raw.training, "Tr", "Tr"), (raw.unseen, raw.unseen_part, "Ts")):
            for kind in ("images", "labels"):
                (partial / f"{kind}{part}").mkdir()
                source, belongs = raw.folder / f"{kind}{source_part}", _belongs_to(kind, cases, description)
                files = [path for path in sorted(source.iterdir()) if belongs(path.name)]
                _link_files(files, partial / f"{kind}{part}")
        (partial / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _belongs_to(kind: str, cases: tuple[str, ...], description: dict[str, Any]) -> Callable[[str], bool]:
    """Tell files of the cases: images or labels, and the .json that nnU-Net wants beside .tif."""
    channel = r"_\d{4}" if kind == "images" else ""
    any_case = "|".join(re.escape(case) for case in cases)
    pattern = rf"(?:{any_case})(?:{channel}{re.escape(str(description['file_ending']))}|\.json)"
    return lambda name: re.fullmatch(pattern, name) is not None


def _link_files(paths: list[Path], target: Path) -> None:
    for path in paths:
        try:
            (target / path.name).symlink_to(path.resolve())
        except (OSError, NotImplementedError):  # Windows without the right, file systems without links
            shutil.copyfile(path, target / path.name)
