"""Where references, images and splits of a run's cases lie on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ext.nnunet.datasets import read_dataset
from nnunet_ext.nnunet.splits import validation_cases

_REFERENCES = ("labelsTr", "labelsTs")
_IMAGES = ("imagesTr", "imagesTs")


@dataclass(frozen=True, kw_only=True)
class Places:
    """Folders to search in.

    Args:
        raw, preprocessed: What nnU-Net's variables name; None where they are not set.
        references, images: Folders that the user names; searched first.
    """

    raw: Path | None = None
    preprocessed: Path | None = None
    references: Path | None = None
    images: Path | None = None

    def reference(self, dataset_name: str, case: str, ending: str) -> Path | None:
        """File of a case's reference segmentation."""
        folders = [self.references]
        folders += [self.preprocessed / dataset_name / "gt_segmentations"] if self.preprocessed else []
        folders += [self.raw / dataset_name / name for name in _REFERENCES] if self.raw else []
        return _first(folders, f"{case}{ending}")

    def image(self, dataset_name: str, case: str, ending: str) -> Path | None:
        """File of the first channel of a case's image."""
        folders = [self.images]
        folders += [self.raw / dataset_name / name for name in _IMAGES] if self.raw else []
        return _first(folders, f"{case}_0000{ending}")

    def validation_cases(self, dataset_name: str, fold: str) -> list[str] | None:
        """Cases that nnU-Net's split holds back in a fold; None where the split isn't here.

        Raises:
            UsageError: the file is cut off or something else.
        """
        if self.preprocessed is None or not fold.isdecimal():
            return None
        return dict(enumerate(validation_cases(self.preprocessed / dataset_name))).get(int(fold))


def _first(folders: Sequence[Path | None], name: str) -> Path | None:
    return next((folder / name for folder in folders if folder is not None and (folder / name).is_file()), None)


def dataset_of(folders: Sequence[Path], description: Path | None) -> dict[str, Any]:
    """Content of the dataset.json that labels and file ending are taken from.

    Args:
        folders: Folders of predictions and references; nnU-Net's prediction leaves a dataset.json there.
        description: File that the user names, searched first.

    Raises:
        UsageError: there is none, or it is not nnU-Net's.
    """
    candidates = [description] if description else [f / "dataset.json" for f in folders]
    candidates += [] if description else [folder.parent / "dataset.json" for folder in folders]
    path = next((path for path in candidates if path.is_file()), candidates[0])
    cure = "name nnU-Net's dataset.json of these labels by -djfile"
    return read_dataset(path, cure)
