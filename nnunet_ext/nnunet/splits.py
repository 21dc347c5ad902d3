"""nnU-Net's split of a data set into folds."""

from __future__ import annotations

from pathlib import Path

from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json

_CURE = "restore it, or delete it and let nnU-Net make it again"


def validation_cases(folder: Path) -> list[list[str]]:
    """Cases that each fold holds back; empty where nnU-Net has made no split yet.

    Args:
        folder: Folder of the data set in nnUNet_preprocessed.

    Raises:
        UsageError: the file is cut off or something else.
    """
    path = folder / "splits_final.json"
    if not path.is_file():
        return []
    try:
        return [[str(case) for case in split["val"]] for split in read_json(path, _CURE, list)]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} must hold a list of splits with 'val', it does not: {_CURE}.") from error
