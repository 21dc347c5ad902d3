"""Files and folders that are either whole or not there, and a lock that two runs can't both hold."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nnunet_ext.errors import UsageError

# Names of files and folders that are being written begin with this; their process follows.
PARTIAL = ".partial-nnunet_ext-"
_LARGEST_JSON = 2**29  # bytes; a summary.json of 100 000 cases with ten structures has half of it


def check_regular(path: Path, cure: str) -> None:
    """See that a path names a file that can be read to an end: a pipe would wait for ever.

    Args:
        path: File, or a link to it.
        cure: What to do when it is none, as the end of a sentence.

    Raises:
        UsageError: it is missing, or something else than a file.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing: {cure}.") from error
    except (OSError, ValueError) as error:  # a loop of links; a name that no file can have
        raise UsageError(f"{path} can't be read ({error}): {cure}.") from error
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} must be a file, it is {'a folder' if stat.S_ISDIR(mode) else 'none'}: {cure}.")


def read_json(path: Path, cure: str, kind: type = dict) -> Any:
    """Read a JSON object, or a list.

    Args:
        path: File to read.
        cure: What to do when it can't be read, as the end of a sentence.
        kind: What the file must hold, `dict` or `list`.

    Raises:
        UsageError: the file can't be read or holds something else.
    """
    check_regular(path, cure)
    if (size := path.stat().st_size) > _LARGEST_JSON:
        raise UsageError(f"{path} has {size} bytes, more than any JSON file of nnU-Net: {cure}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UsageError(f"{path} can't be read (nested too deeply): {cure}.") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read ({error}): {cure}.") from error
    if not isinstance(content, kind):
        raise UsageError(f"{path} must hold a JSON {kind.__name__}, got a {type(content).__name__}: {cure}.")
    return content


def sha256(path: Path) -> str:
    """Checksum of a file, however large."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` of writing `path` inside the block into a `UsageError` that names it and the cure."""
    try:
        yield
    except OSError as error:
        if not _concerns(error, path.absolute()):
            raise
        reason = error.strerror or str(error) or type(error).__name__
        raise UsageError(
            f"can't write {path}: {reason}. Make it writable or free space, then call again, "
            "or choose another output folder."
        ) from error


def _concerns(error: OSError, path: Path) -> bool:
    """Whether the file that failed lies beside or below `path`, or on the way to it; True where none is named."""
    if not isinstance(error.filename, str):
        return True
    failed = Path(error.filename).absolute()
    return path.parent in (failed, *failed.parents) or failed in path.parents


def partial(path: Path) -> Path:
    """A new name beside `path`, to write under until the work is whole; it tells the process that writes."""
    process = os.getpid()
    return path.with_name(f"{PARTIAL}{_machine()}-{process}-{_start(process)}-{secrets.token_hex(4)}")


def remove_partials(folder: Path, of_living: bool = False) -> None:
    """Delete what killed processes of this machine left in `folder`; with `of_living` what any process did.

    Whether a process of another machine lives can't be known from here.
    """
    for path in folder.glob(f"{PARTIAL}*") if folder.is_dir() else ():
        match = re.fullmatch(rf"{re.escape(PARTIAL)}(.+)-(\d+)-(\d+)-[0-9a-f]{{8}}", path.name)
        if match and (of_living or (match[1] == _machine() and not _lives(int(match[2]), int(match[3])))):
            _delete(path)


def _machine() -> str:
    """Name of this machine and, on Linux, of the space of its process numbers: containers have their own."""
    try:
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _start(process: int) -> int:
    """When a process began, in ticks since the machine did; 0 where the system doesn't say (not Linux)."""
    try:
        # The name before the last bracket may hold anything.
        return int(Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _lives(process: int, start: int) -> bool:
    """Whether the process that began at `start` lives, and not another one that got its number since."""
    import psutil

    try:
        alive = psutil.Process(process).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return alive and start in (0, _start(process))
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # somebody else's
        return True


def _delete(path: Path) -> None:
    """Delete a file or folder; what can't be deleted stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `path` whole, in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `path` whole: an interruption leaves the old file, or none."""
    with writing(path), _parts({path: content}) as parts:
        os.replace(parts[path], path)


def write_files(folder: Path, contents: Mapping[str, bytes], gone: Iterable[str] = ()) -> None:
    """Write files that belong together: after an error those of an earlier call are there unchanged.

    A kill leaves the earlier files or the new ones; in the moment in which all are renamed, some of one kind. Never
    is a new file mixed with an old one.

    Args:
        folder: Folder to write to; it is made.
        contents: Name below `folder` -> content.
        gone: Names of earlier files that are deleted.

    Raises:
        UsageError: the folder can't be written.
    """
    with writing(folder), _parts({folder / name: content for name, content in contents.items()}) as parts:
        _swap(parts, [folder / name for name in gone])


def check_folder(folder: Path) -> None:
    """See that `folder` can be written, or made, before long work begins whose result goes there.

    Raises:
        UsageError: it can't.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    probe = partial(nearest / "probe")
    with writing(folder):
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            raise OSError(error.errno, error.strerror) from error  # about `folder`, whatever it names


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name to write under, in a folder of its own; the file replaces `path` when the block ends well.

    Unlike `write_bytes` for what others write; its last name is that of `path`, which some store in the file.
    """
    folder = partial(path)
    folder.mkdir()
    try:
        part = folder / path.name
        yield part
        with part.open("r+b") as stream:
            os.fsync(stream.fileno())  # network file systems report a full disk here
        os.replace(part, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder to fill; it takes the name `path` when the block ends without an error.

    What killed runs left beside `path` is deleted first.

    Args:
        path: Name of the folder.
        replace: Whether an earlier `path` may be there; it is deleted when the new one is whole.

    Raises:
        UsageError: the folder can't be written, or is there and must not be replaced.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(path.parent)
        folder = partial(path)
        folder.mkdir()
        try:
            yield folder
            if not replace and os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            _swap({path: folder})
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _parts(contents: Mapping[Path, bytes]) -> Iterator[dict[Path, Path]]:
    """Write each content beside its place and give the names; what is left of them at the end is deleted."""
    parts: dict[Path, Path] = {}
    try:
        for folder in {path.parent for path in contents}:
            folder.mkdir(parents=True, exist_ok=True)
            remove_partials(folder)
        for path, content in contents.items():
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            parts[path] = partial(path)
            with parts[path].open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        yield parts
    finally:
        for part in parts.values():
            _delete(part)


def _swap(parts: Mapping[Path, Path], gone: Iterable[Path] = ()) -> None:
    """Give each part its place; what stood there, and `gone`, is deleted. After an error all is as it was."""
    aside: dict[Path, Path] = {}
    try:
        for path in (*parts, *gone):
            if os.path.lexists(path):
                aside[path] = partial(path)
                os.rename(path, aside[path])
        for path, part in parts.items():
            os.rename(part, path)
    except BaseException:
        for path, part in parts.items():
            if os.path.lexists(path) and not os.path.lexists(part):
                os.rename(path, part)
        for path, old in aside.items():
            if os.path.lexists(old):
                os.rename(old, path)
        raise
    for old in aside.values():
        _delete(old)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file `path` as a lock, which ends with this process, however that ends; its children don't hold it.

    Where the file system has no locks nothing is held.

    Raises:
        UsageError: somebody else holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    with writing(path):
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise UsageError(
                f"another run is at work in {path.parent}: wait for its end, or choose another output folder."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
    try:
        yield
    finally:
        lock.release()
