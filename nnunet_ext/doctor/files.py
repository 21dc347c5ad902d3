"""Checks names of files by nnU-Net's rule: every file with the right ending counts, hidden ones too."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from nnunet_ext.doctor.finding import Finding, failure, warning
from nnunet_ext.printable import first_few

_BESIDE = (".tif", ".tiff")  # have their spacing in a .json


def of_folder(folder: Path, ending: str, has_channels: bool) -> Iterator[Finding]:
    """What is wrong with the names in a folder of images or labels.

    Args:
        folder: Folder to list.
        ending: Ending of the files that count.
        has_channels: Whether names end with the channel, CASE_0000.
    """
    entries = sorted(folder.iterdir())
    gone = [path.name for path in entries if path.is_symlink() and not path.exists()]
    if gone:
        yield failure(
            folder.name, f"holds links to files that are gone: {first_few(gone)}", "restore them, or link them again"
        )
    names = [path.name for path in entries if path.is_file()]
    hidden = [name for name in names if name.startswith(".")]
    taken = [name for name in hidden if name.endswith(ending)]
    if taken:
        level = failure if has_channels else warning
        yield level(
            folder.name,
            f"holds hidden files, which nnU-Net takes for cases: {first_few(taken)}",
            f"they are companions that macOS made: find {shlex.quote(str(folder))} -name '._*' -delete",
        )
    if rest := [name for name in hidden if name not in taken]:
        yield warning(folder.name, f"holds hidden files: {first_few(rest)}", "delete them, nnU-Net ignores them")
    seen = [name for name in names if name not in hidden]
    beside = ".json" if ending.lower() in _BESIDE else ending
    if other := [name for name in seen if not name.endswith((ending, beside))]:
        yield warning(
            folder.name,
            f"holds files that don't end with {ending}, which nnU-Net ignores: {first_few(other)}",
            "convert or rename them where they are cases, else move them away",
        )
    unnumbered = [name for name in seen if name.endswith(ending) and not _has_channel(name, ending)]
    if has_channels and unnumbered:
        yield failure(
            folder.name,
            f"holds files that are not called CASE_0000{ending}: {first_few(unnumbered)}",
            "add the number of the channel to their names",
        )


def _has_channel(name: str, ending: str) -> bool:
    return re.fullmatch(r".+_\d{4}", name[: -len(ending)]) is not None
