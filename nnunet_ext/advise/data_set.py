"""The data set that is advised on: its fingerprint, and a copy of what planners read of it.

nnU-Net's planners write into nnUNet_preprocessed, even where their plans are not kept: here they work in a folder of
their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json
from nnunet_ext.nnunet.datasets import dataset_folders, find_dataset, number_of, read_dataset

_RAW = "nnUNet_raw"
_NUMBERS = ("spacings", "shapes_after_crop")


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What planners need to know of a data set.

    Args:
        name: DatasetXXX_Name.
        content: Content of dataset.json.
        fingerprint: Content of dataset_fingerprint.json.
    """

    name: str
    content: Mapping[str, Any]
    fingerprint: Mapping[str, Any]

    @property
    def number(self) -> str:
        """As nnU-Net's commands take it."""
        return str(number_of(self.name) or self.name)

    @classmethod
    def find(cls, dataset: str) -> DataSet:
        """Read the fingerprint in nnUNet_preprocessed, and dataset.json in nnUNet_raw or there.

        Args:
            dataset: Number or DatasetXXX_Name.

        Raises:
            UsageError: a file is missing or broken; the sentence says the command that makes it.
        """
        if not dataset.isdecimal() and not dataset.startswith("Dataset"):
            raise UsageError(f"-d needs a number or DatasetXXX_Name, got {dataset}: correct it.")
        number = dataset if dataset.isdecimal() else number_of(dataset)
        extract = f"nnUNetv2_extract_fingerprint -d {number} makes it"
        folder = find_dataset(dataset, "-d", "nnUNet_preprocessed", cure=f"extract its fingerprint: {extract}")
        path = folder / "dataset_fingerprint.json"
        if not path.is_file():
            raise UsageError(f"advise reads the fingerprint of {folder.name}, {path} is missing: {extract}.")
        fingerprint = read_json(path, f"extract it again, {extract}")
        _check(fingerprint, path, extract)
        return cls(name=folder.name, content=_dataset_json(folder), fingerprint=fingerprint)

    def write(self, folder: Path) -> None:
        """Write what planners read, in the folders `raw` and `preprocessed`, as if it had one image."""
        ending = self.content["file_ending"]
        content = {
            "numTraining": len(self.fingerprint["spacings"]),
            **self.content,
            "dataset": {"case": {"images": [f"case_0000{ending}"], "label": f"case{ending}"}},
            "overwrite_image_reader_writer": "SimpleITKIO",  # else nnU-Net opens an image to find one
        }
        files = {
            folder / "raw" / self.name / "dataset.json": content,
            folder / "preprocessed" / self.name / "dataset_fingerprint.json": self.fingerprint,
        }
        for path, value in files.items():
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(value), encoding="utf-8")


def _check(fingerprint: Mapping[str, Any], path: Path, extract: str) -> None:
    values = [fingerprint.get(key) for key in _NUMBERS]
    sizes = {len(value) if isinstance(value, list) else 0 for value in values}
    if len(sizes) != 1 or not sizes.pop() or any(len(n) != 3 or min(n) <= 0 for value in values for n in value or ()):
        raise UsageError(
            f"{path} must hold {' and '.join(_NUMBERS)} of every case, three positive numbers each: extract it again, "
            f"{extract}."
        )


def _dataset_json(preprocessed: Path) -> dict[str, Any]:
    raw = Path(os.environ.get(_RAW) or preprocessed.parent)
    folders = [*(dataset_folders(raw, preprocessed.name) if raw.is_dir() else []), preprocessed]
    path = next((f / "dataset.json" for f in folders if (f / "dataset.json").is_file()), None)
    if path is None:
        raise UsageError(
            f"advise reads dataset.json of {preprocessed.name}, there is none in {folders[0]}: set nnUNet_raw to the "
            "folder that holds the data set."
        )
    return read_dataset(path, "correct it")


@contextmanager
def planners_in(folder: Path) -> Iterator[None]:
    """Let nnU-Net's planners read and write below this folder, whatever its variables say.

    Before nnU-Net 2.8 its planners know their folders from the import on, so that the variables can't be set for them.
    """
    from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner as host

    before = {name: getattr(host, f"nnUNet_{name}") for name in ("raw", "preprocessed")}
    try:
        for name in before:
            setattr(host, f"nnUNet_{name}", str(folder / name))
        yield
    finally:
        for name, value in before.items():
            setattr(host, f"nnUNet_{name}", value)
