"""Tells files that a kill or a full disk cut off, also where their readers do not: ITK fills them up with zeros.

What a file is, its content says: nnU-Net's readers don't mind a plain NIfTI file called .nii.gz either. Formats whose
readers say so themselves (.nrrd, .png, .bmp) are left to them.
"""

from __future__ import annotations

import gzip
import json
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any, cast

import numpy as np

_PIECE = 2**24  # bytes read at once
_HEADER = 4096  # bytes; NIfTI-2 has 540, MetaImage lines of text
_GIPL = (719555000, 4026526128)  # magic numbers at the end of its header
_META_BYTES = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}  # or more
_TIFF_BYTES = {3: 2, 4: 4, 13: 4, 16: 8, 18: 8}  # of a whole number, by its kind
_TIFF_STRIPS = (273, 279, 324, 325)  # tags that say where strips and tiles are, and how long
_GIPL_BITS = {1: 1, 7: 8, 8: 8, 15: 16, 16: 16, 31: 32, 32: 32, 64: 32, 65: 64}


def is_whole(path: Path) -> bool:
    """Whether a file is there and not cut off; see `check_whole`."""
    try:
        check_whole(path)
    except (ValueError, OSError):
        return False
    return True


def check_whole(path: Path) -> int:
    """Read a file to the end of what it holds.

    That is gzip, NIfTI, MetaImage, GIPL, TIFF, zip (.npz, .pth), .b2nd, .pkl (not run), .json.

    Returns:
        How many numbers of a NIfTI file are NaN or infinite: ITK reads them as zeros.

    Raises:
        ValueError: it is cut off or damaged.
        OSError: it can't be read at all.
    """
    if not S_ISREG(path.stat().st_mode):
        raise ValueError("it is no file")  # a pipe would wait for ever
    check = _BY_SUFFIX.get(path.suffix.lower())
    try:
        if check is not None:
            check(path)
            return 0
        with path.open("rb") as plain:
            is_gzip = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_gzip else path.open("rb") as stream:
            return _check_image(cast("IO[bytes]", stream), is_gzip)
    except (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"it is cut off or damaged: {error}") from error


def _check_image(stream: IO[bytes], to_the_end: bool) -> int:
    """Compare the bytes that a header promises with those that follow; a gzip stream has a checksum."""
    header = stream.read(_HEADER)
    if not header:
        raise ValueError("it is empty")
    start, needed, dtype = _nifti_layout(header) or _meta_layout(header) or _gipl_layout(header)
    stream.seek(start)
    there, odd = start, 0
    while (to_the_end or there < needed) and (piece := stream.read(_PIECE)):
        there += len(piece)
        if dtype.kind in "fc":
            numbers = np.frombuffer(piece, dtype, len(piece) // dtype.itemsize)
            odd += int(numbers.size - np.isfinite(numbers).sum())
    if there < needed:
        raise ValueError(f"it is cut off: {there} of {needed} bytes are there")
    return odd


def _nifti_layout(header: bytes) -> tuple[int, int, np.dtype[Any]] | None:
    """Where the numbers of a NIfTI file in one piece start and end, in bytes, and what they are."""
    from nibabel import Nifti1Header, Nifti2Header
    from nibabel.spatialimages import HeaderDataError

    for kind in (Nifti1Header, Nifti2Header):
        size, place = kind.template_dtype.itemsize, kind.template_dtype.fields["magic"][1]
        if len(header) >= size and header[place : place + 3] in (b"n+1", b"n+2"):
            found = kind(header[:size], check=False)
            try:
                start, dtype = int(found.get_data_offset()), found.get_data_dtype()
                return start, start + prod(map(int, found.get_data_shape())) * dtype.itemsize, dtype
            except (HeaderDataError, LookupError, ValueError, OverflowError) as error:
                raise ValueError("its header is damaged") from error
    return None


def _meta_layout(header: bytes) -> tuple[int, int, np.dtype[Any]] | None:
    """The same of a MetaImage (.mha), whose reader raises "No such file"; its numbers need no look."""
    lines, mark, rest = header.partition(b"ElementDataFile = LOCAL\n")
    pairs = [line.split(" = ", 1) for line in lines.decode("latin-1").splitlines() if " = " in line]
    found = {key: value.strip() for key, value in pairs}
    if not mark or "DimSize" not in found:
        return None
    start = len(header) - len(rest)
    kind = found.get("ElementType", "").removeprefix("MET_").removeprefix("U")
    try:
        voxels = prod(map(int, found["DimSize"].split())) * int(found.get("ElementNumberOfChannels", 1))
        size = int(found.get("CompressedDataSize", voxels * _META_BYTES.get(kind, 0)))
    except ValueError as error:
        raise ValueError("its header is damaged") from error
    return start, start + size, np.dtype("u1")


def _gipl_layout(header: bytes) -> tuple[int, int, np.dtype[Any]]:
    """The same of a GIPL file, whose numbers need no look; (0, 0, bytes) for anything else."""
    if len(header) < 256 or int.from_bytes(header[252:256], "big") not in _GIPL:
        return 0, 0, np.dtype("u1")
    *shape, kind = (int.from_bytes(header[i : i + 2], "big") for i in range(0, 10, 2))
    return 256, 256 + prod(max(1, n) for n in shape) * _GIPL_BITS.get(kind, 0) // 8, np.dtype("u1")


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"its part {damaged} is damaged")


def _check_pickle(path: Path) -> None:
    with path.open("rb") as stream:
        for _ in pickletools.genops(stream):  # to its end, without running what it says
            pass


def _check_blosc(path: Path) -> None:
    import blosc2

    try:
        blosc2.open(str(path), mode="r")
    except RuntimeError as error:  # it looks for the end of the file first
        raise ValueError(f"it is cut off or damaged: {error}") from error


def _check_tiff(path: Path) -> None:
    """Follow the chain of pages to its end: readers take the pages and strips that they find for all."""
    from tifffile import TiffFile, TiffFileError

    try:
        with TiffFile(path) as file:
            stream, layout = file.filehandle, file.tiff
            tag = f"{layout.byteorder}HHQQ" if layout.offsetsize == 8 else f"{layout.byteorder}HHII"
            places, needed = {0}, 0
            stream.seek(layout.offsetsize)  # where the place of the first page is written
            while (place := _next(stream, layout.offsetformat)[0]) not in places:
                places.add(place)
                stream.seek(place)
                for _ in range(_next(stream, layout.tagnoformat)[0]):
                    name, kind, count, value = _next(stream, tag)
                    size = count * _TIFF_BYTES.get(kind, 0)
                    if name in _TIFF_STRIPS and size > layout.offsetsize:  # else the value itself stands there
                        needed = max(needed, value + size)
            if place:
                raise ValueError("it is damaged: its pages lead in a circle")
            ends = [map(sum, zip(page.dataoffsets, page.databytecounts, strict=False)) for page in file.pages]
            needed, there = max(needed, *(end for page in ends for end in page)), stream.size
    except (TiffFileError, struct.error) as error:
        raise ValueError(f"it is cut off or damaged: {error}") from error
    if needed > there:
        raise ValueError(f"it is cut off: {there} of {needed} bytes are there")


def _next(stream: Any, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, stream.read(struct.calcsize(layout)))


def _check_json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


_BY_SUFFIX: Mapping[str, Callable[[Path], None]] = {
    ".npz": _check_zip,
    ".pth": _check_zip,
    ".b2nd": _check_blosc,
    ".pkl": _check_pickle,
    ".json": _check_json,
    ".tif": _check_tiff,
    ".tiff": _check_tiff,
}
