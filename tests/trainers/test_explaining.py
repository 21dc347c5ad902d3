"""Full disks and killed processes are told in one sentence; other errors stay as they are."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ext.errors import UsageError
from nnunet_ext.trainers import explaining
from nnunet_ext.trainers.explaining import check_predictions, explained


def full(path: Path) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_full_disk_is_told_with_file_and_cure(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    words = rf"can't write {path} \(No space left.*KB are free\): make room.*with --c"
    with pytest.raises(UsageError, match=words), explained(tmp_path, "--c"):
        raise full(path)


def test_error_of_a_library_is_told_as_a_full_disk_where_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explaining.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2000))
    words = rf"can't write {tmp_path} \(ITK ERROR; 1 KB are free\).*with --val"
    with pytest.raises(UsageError, match=words), explained(tmp_path, "--val"):
        raise RuntimeError("ITK ERROR\nand more")


def test_killed_augmentation_process_is_told_with_a_cure(tmp_path: Path) -> None:
    said = "One or more background workers are no longer alive. Exiting."
    words = r"^an augmentation process has ended.*nnUNet_n_proc_DA.*with --c\.$"
    with pytest.raises(RuntimeError, match=words), explained(tmp_path, "--c"):
        raise RuntimeError(said)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), FileNotFoundError(2, "no", "x"), ValueError("odd")])
def test_other_errors_stay_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, explained(tmp_path, "--c"):
        raise error
    assert caught.value is error


def test_scores_of_a_prediction_that_is_cut_off_are_deleted(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (24, 24, 24)).astype(np.uint8)
    whole, path, summary = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", tmp_path / "summary.json"
    for name in (whole, path):
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(name))
    summary.write_text("{}")
    check_predictions(tmp_path, ".nii.gz")
    assert summary.exists()
    path.write_bytes(path.read_bytes()[:1800])
    assert (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) != labels).any()  # ITK reads it without an error
    with pytest.raises(UsageError, match=rf"can't write {path} .*scores would be wrong.*--val"):
        check_predictions(tmp_path, ".nii.gz")
    assert not summary.exists()
