"""Data sets of nnU-Net: their names, their folders, and their dataset.json, checked where it comes in.

The rule of names is nnU-Net's: DatasetXXX..., XXX a number of three or more digits, whatever follows. nnU-Net's own
functions look in all three of its folders and take no other; these look in one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json
from nnunet_ext.nnunet.trust import is_host_name
from nnunet_ext.nnunet.values import is_int, is_list_of, is_plain_name, shown


def number_of(name: str) -> int | None:
    """The number by which nnU-Net's commands take a data set of this name; None where they can't."""
    match = re.match(r"Dataset(\d{3,})", name)
    # nnU-Net pads numbers to three digits: it would look for Dataset012 where the folder is Dataset0012.
    return int(match[1]) if match and match[1] == f"{int(match[1]):03d}" else None


def dataset_folders(root: Path, dataset: str) -> list[Path]:
    """Folders below `root` that a data set's number or full name means, sorted; one is right."""
    folders = sorted(path for path in root.glob("Dataset*") if path.is_dir())
    if dataset.isdecimal():
        return [path for path in folders if number_of(path.name) == int(dataset)]
    return [path for path in folders if path.name == dataset]


def find_dataset(
    dataset: str,
    option: str,
    variable: str,
    root: Path | None = None,
    instead: str = "",
    cure: str = "give its number or full name",
) -> Path:
    """Folder of a data set below one of nnU-Net's three folders.

    Args:
        dataset: Number or full name.
        option: Option that names it.
        variable: Variable of the environment with the folder to look in.
        root: Folder to look in instead.
        instead: What may be given instead of the variable.
        cure: What to do when there is none, as the end of a sentence.

    Raises:
        UsageError: the folder is not named or not there, there is no such data set, or several have its number.
    """
    or_else = f", or {instead}" if instead else ""
    if root is None:
        if not os.environ.get(variable):
            raise UsageError(f"{option} needs the environment variable {variable}, which is not set: set it{or_else}.")
        root = Path(os.environ[variable])
    if not root.is_dir():
        raise UsageError(
            f"{option} looks in {variable}, which must name an existing folder, got {root}: correct it{or_else}."
        )
    found = dataset_folders(root, dataset)
    if len(found) != 1:
        names = [path.name for path in found or sorted(root.iterdir()) if path.is_dir()]
        raise UsageError(
            f"{option} must be one data set in {root}, got {dataset}: there is {', '.join(names) or 'none'}: "
            f"{'give its full name' if found else cure}."
        )
    return found[0]


def read_dataset(path: Path, cure: str, needed: Iterable[str] = ("labels", "file_ending")) -> dict[str, Any]:
    """Read a dataset.json.

    Args:
        path: File to read.
        cure: What to do when it can't be used, as the end of a sentence.
        needed: Keys that it must have.

    Raises:
        UsageError: it can't be read, lacks a key, or has something else than nnU-Net writes.
    """
    content: dict[str, Any] = read_json(path, cure)
    if missing := [key for key in needed if content.get(key) is None]:
        raise UsageError(f"{path} must hold {' and '.join(needed)}, it lacks {' and '.join(missing)}: {cure}.")
    for key, (is_right, rule) in _DATASET.items():
        if key in content and not is_right(content[key]):
            raise UsageError(f"{path}: {key} must be {rule}, got {shown(content[key])}: {cure}.")
    return content


def _is_label(value: Any) -> bool:
    def is_number(value: Any) -> bool:
        is_text, is_float = isinstance(value, str), isinstance(value, float)
        return is_int(value) or (is_text and value.isdecimal()) or (is_float and value.is_integer())

    return is_number(value) or (is_list_of(value, is_number) and len(value) > 0)


def _are_channels(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(isinstance(name, str) for name in value.values())


def _is_case(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("label"), str):
        return False
    images = value.get("images")
    return isinstance(images, list) and len(images) > 0 and all(isinstance(path, str) for path in images)


_DATASET = {
    "labels": (
        lambda value: isinstance(value, dict) and len(value) > 0 and all(map(_is_label, value.values())),
        "names with whole numbers or lists of them",
    ),
    "file_ending": (
        lambda value: is_plain_name(value) and not re.search(r"[*?\[\]]", value),
        "the ending of a file's name",
    ),
    "channel_names": (_are_channels, "numbers with names"),
    "modality": (_are_channels, "numbers with names"),
    "regions_class_order": (lambda value: value is None or is_list_of(value, is_int), "a list of whole numbers"),
    "overwrite_image_reader_writer": (
        lambda value: value is not None and is_host_name("overwrite_image_reader_writer", value),
        "the name of a reader of nnU-Net",
    ),
    "dataset": (
        lambda value: isinstance(value, dict) and all(map(is_plain_name, value)) and all(map(_is_case, value.values())),
        "names of cases with their images, a list of files, and label, a file",
    ),
}
