"""A file that was cut off is told, in each format whose reader fills it up in silence."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import torch

from nnunet_ext.whole import check_whole, is_whole


def volume() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 200, (8, 16, 16)).astype(np.uint8)


def image(path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(volume()), str(path))


def nifti2(path: Path) -> None:
    import nibabel

    nibabel.save(nibabel.Nifti2Image(volume(), np.eye(4)), path)


def plain_nifti_called_gz(path: Path) -> None:
    image(path.with_name("plain.nii"))
    path.with_name("plain.nii").rename(path)


def compressed_half(path: Path) -> None:
    """A file that was cut off before it was compressed."""
    image(path.with_name("plain.nii"))
    path.write_bytes(gzip.compress(path.with_name("plain.nii").read_bytes()[:1000]))


def compressed(path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(volume()), str(path), useCompression=True)


def blosc(path: Path) -> None:
    import blosc2

    blosc2.asarray(volume(), urlpath=str(path))


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.nii.gz": image,
    "a.nii": image,
    "plain.nii.gz": plain_nifti_called_gz,
    "two.nii": nifti2,
    "two.nii.gz": nifti2,
    "a.gipl": image,
    "a.mha": image,
    "compressed.mha": compressed,
    "a.npz": lambda path: np.savez_compressed(path, a=volume()),
    "a.b2nd": blosc,
    "a.pkl": lambda path: path.write_bytes(pickle.dumps({"a": list(range(1000))})),
    "a.json": lambda path: path.write_text(json.dumps(list(range(1000)))),
    "a.pth": lambda path: torch.save({"a": torch.zeros(1000)}, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_whole_files_pass_and_cut_ones_do_not(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    content = path.read_bytes()
    assert is_whole(path)
    for n in (0, len(content) // 2, len(content) * 99 // 100, len(content) - 1):
        path.write_bytes(content[:n])
        assert not is_whole(path)


TIFF: dict[str, Callable[[Path], None]] = {
    "of itk": image,
    "of tifffile": lambda path: tifffile.imwrite(path, volume()),
    "in strips": lambda path: tifffile.imwrite(path, volume(), rowsperstrip=2, photometric="minisblack"),
    "big, in compressed tiles": lambda path: tifffile.imwrite(
        path, volume(), tile=(16, 16), bigtiff=True, compression="zlib"
    ),
    "of imagej": lambda path: tifffile.imwrite(path, volume(), imagej=True),
}


@pytest.mark.parametrize("kind", TIFF)
def test_a_tiff_without_its_last_pages_or_strips_is_not_whole(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    TIFF[kind](path)
    content = path.read_bytes()
    assert is_whole(path)
    for n in range(0, len(content), 7):
        path.write_bytes(content[:n])
        assert not is_whole(path) or (tifffile.imread(path) == volume()).all()


def test_a_tiff_whose_pages_lead_in_a_circle_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, volume()[0])
    content = path.read_bytes()
    first = int.from_bytes(content[4:8], "little")
    after = first + 2 + 12 * int.from_bytes(content[first : first + 2], "little")
    path.write_bytes(content[:after] + content[4:8] + content[after + 4 :])
    with pytest.raises(ValueError, match="circle"):
        check_whole(path)


@pytest.mark.parametrize(("place", "value"), [(70, b"\x03"), (108, b"\0\0\xc0\x7f")])
def test_a_damaged_header_is_called_so(place: int, value: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    image(path)
    content = path.read_bytes()  # an unknown type; NaN where the numbers start
    path.write_bytes(content[:place] + value + content[place + len(value) :])
    with pytest.raises(ValueError, match="its header is damaged"):
        check_whole(path)


def test_a_file_that_was_cut_off_before_it_was_compressed_is_told(tmp_path: Path) -> None:
    compressed_half(tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match="it is cut off: 1000 of 2400 bytes are there"):
        check_whole(tmp_path / "a.nii.gz")


def test_missing_file_is_not_whole(tmp_path: Path) -> None:
    assert not is_whole(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nan_and_infinity_that_itk_hides_are_counted(dtype: str, ending: str, tmp_path: Path) -> None:
    values = volume().astype(dtype)
    values[3, 2, 1], values[-1, -1, -1] = np.nan, np.inf
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
    assert np.isfinite(sitk.GetArrayFromImage(sitk.ReadImage(str(path)))).all()
    assert check_whole(path) == 2


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, ...]:
            return pytest.fail, ("it was run",)

    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Runs()))
    assert is_whole(tmp_path / "a.pkl")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("name", ["a.nii.gz", "a.npz", "a.json"])
def test_a_pipe_is_no_whole_file_and_nobody_waits_for_it(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    assert not is_whole(tmp_path / name)
