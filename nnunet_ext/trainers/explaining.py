"""What nnU-Net, ITK and the system report of a full disk or a killed process, as one sentence with a cure."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path

from nnunet_ext.errors import UsageError
from nnunet_ext.whole import check_whole

_FULL = (ENOSPC, EDQUOT, EFBIG)
_LOW = 2**20  # bytes; what is written next is larger
_WORKERS = "background workers are no longer alive"  # what batchgenerators says of a process that has ended


@contextmanager
def explained(folder: Path, again: str) -> Iterator[None]:
    """Say in the last line of a traceback what a user can do about it.

    Args:
        folder: Folder of the fold.
        again: Option of `nnUNetv2_train` that goes on.

    Raises:
        UsageError: the disk is full.
        RuntimeError: an augmentation process has ended, or what the block raises.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if _WORKERS in str(error):
            raise RuntimeError(
                f"an augmentation process has ended ({_WORKERS}): where no error of it stands above, the system has "
                "killed it, mostly because memory ran out. Take fewer processes (nnUNet_n_proc_DA) or more memory, "
                f"then call again with {again}."
            ) from error
        free = _free(folder)
        # Libraries report a full disk as errors of their own.
        if getattr(error, "errno", None) in _FULL or (free < _LOW and not isinstance(error, UsageError)):
            path = getattr(error, "filename2", None) or getattr(error, "filename", None) or folder
            reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
            raise UsageError(
                f"can't write {path} ({reason}; {free // 2**10} KB are free): make room, then call again with {again}."
            ) from error
        raise


def _free(folder: Path) -> int:
    """Bytes; many where the file system does not say."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return _LOW


def check_predictions(folder: Path, ending: str) -> None:
    """See that the predictions of a validation are whole: ITK writes to a full disk, and reads it, without an error.

    The scores were computed of what is there. Where that is cut off, they are deleted.

    Args:
        folder: Folder of the validation.
        ending: Of the segmentations' files.

    Raises:
        UsageError: one is cut off.
    """
    for path in sorted(folder.glob(f"*{ending}")):
        try:
            check_whole(path)
        except ValueError as error:
            (folder / "summary.json").unlink(missing_ok=True)
            raise UsageError(
                f"can't write {path} ({error}), so that its scores would be wrong: make room on the disk, then "
                "call again with --val."
            ) from error
