"""Files and folders that are either whole or not there, and a lock that two runs can't both hold."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunet_ext.errors import UsageError

# Files and folders with this in their name are being written; a run that finds them deletes them.
PARTIAL = ".partial-"


def read_json(path: Path, cure: str, kind: type = dict) -> Any:
    """Read a JSON object, or a list.

    Args:
        path: of the file.
        cure: what to do when it can't be read, as the end of a sentence.
        kind: what the file must hold, `dict` or `list`.

    Raises:
        UsageError: the file can't be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing: {cure}.") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read ({error}): {cure}.") from error
    if not isinstance(content, kind):
        raise UsageError(f"{path} must hold a JSON {kind.__name__}, got a {type(content).__name__}: {cure}.")
    return content


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `UsageError` that names `path` and the cure."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise UsageError(
            f"can't write {path}: {reason}. Make it writable or free space, then call again, "
            "or choose another output folder."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write `path` whole, in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `path` whole: an interruption leaves the old file, or none."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
        try:
            with part.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it takes the name `path` when the block ends without an error.

    What a killed run left beside `path`, and an earlier `path` itself, are deleted first.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in [path, *path.parent.glob(f"{PARTIAL}*")]:
            if left.is_dir():
                shutil.rmtree(left)
        folder = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent))
        try:
            yield folder
            folder.chmod(0o755)
            os.replace(folder, path)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def locked(path: Path) -> Iterator[int | None]:
    """Hold the file `path` as a lock; the descriptor is for children, who keep the lock while they live.

    Without file locks (Windows, some network file systems) nothing is locked and the descriptor is None.

    Raises:
        UsageError: somebody else holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    with writing(path):
        stream = path.open("a")
    with stream:
        held = True
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another run is at work in {path.parent}: wait for its end, or choose another output folder."
            ) from error
        except OSError:  # a file system without locks
            held = False
        yield stream.fileno() if held else None
