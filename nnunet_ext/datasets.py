"""Names of data sets, by nnU-Net's rule: DatasetXXX..., XXX a number of three or more digits, whatever follows.

nnU-Net's own functions look in all three of its folders and take no other; these look in one.
"""

from __future__ import annotations

import re
from pathlib import Path


def number_of(name: str) -> int | None:
    """The number by which nnU-Net's commands take a data set of this name; None where they can't."""
    match = re.match(r"Dataset(\d{3,})", name)
    # nnU-Net pads numbers to three digits: it would look for Dataset012 where the folder is Dataset0012.
    return int(match[1]) if match and match[1] == f"{int(match[1]):03d}" else None


def dataset_folders(root: Path, dataset: str) -> list[Path]:
    """Folders below `root` that a data set's number or whole name means, sorted; one is right."""
    folders = sorted(path for path in root.glob("Dataset*") if path.is_dir())
    if dataset.isdecimal():
        return [path for path in folders if number_of(path.name) == int(dataset)]
    return [path for path in folders if path.name == dataset]
