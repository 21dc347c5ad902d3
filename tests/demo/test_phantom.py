"""The phantom: the same on every call, every label in every case, accepted by nnU-Net, whole or not there."""

from __future__ import annotations

import json
import multiprocessing.dummy
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

from nnunet_ext.demo import phantom
from nnunet_ext.demo.phantom import LABELS, NAME, PhantomSpec, make_case, write_dataset
from nnunet_ext.errors import UsageError
from tests.conftest import KilledPartial

SPEC = PhantomSpec()
ALL_CASES = range(SPEC.n_training + SPEC.n_test)
TWO_CASES = PhantomSpec(n_training=1, n_test=1)
case = cache(lambda index: make_case(SPEC, index))


def test_there_are_ten_or_more_training_cases_and_two_unseen() -> None:
    assert SPEC.n_training >= 10
    assert SPEC.n_test == 2


def test_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    arrays = []
    for name in ("first", "second"):
        write_dataset(tmp_path / name, TWO_CASES)
        files = sorted((tmp_path / name).rglob("*.nii.gz"))
        images = [SimpleITK.ReadImage(str(file)) for file in files]
        arrays.append(
            [(f.name, SimpleITK.GetArrayFromImage(i), i.GetSpacing()) for f, i in zip(files, images, strict=True)]
        )
    assert len(arrays[0]) == 4
    for (name, array, spacing), (other_name, other_array, other_spacing) in zip(*arrays, strict=True):
        assert name == other_name
        assert spacing == other_spacing
        assert array.dtype == other_array.dtype
        np.testing.assert_array_equal(array, other_array)


def test_another_seed_gives_other_cases() -> None:
    other = make_case(PhantomSpec(seed=SPEC.seed + 1), 0)
    assert other.spacing != case(0).spacing


def test_numpy_global_generator_is_neither_used_nor_changed() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    first = make_case(SPEC, 0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]
    np.testing.assert_array_equal(first.image, case(0).image)


@pytest.mark.parametrize("index", ALL_CASES)
def test_every_label_is_in_every_case(index: int) -> None:
    assert set(np.unique(case(index).labels)) == set(LABELS.values())


@pytest.mark.parametrize("index", ALL_CASES)
def test_lesion_is_small_and_inside_the_liver(index: int) -> None:
    labels = case(index).labels
    lesion, liver = labels == LABELS["lesion"], labels == LABELS["liver"]
    assert 20 <= lesion.sum() < 0.08 * liver.sum()
    around = SimpleITK.GetArrayFromImage(
        SimpleITK.BinaryDilate(SimpleITK.GetImageFromArray(lesion.astype(np.uint8)), [1, 1, 1])
    ).astype(bool)
    neighbours = set(np.unique(labels[around & ~lesion]))
    assert neighbours == {LABELS["liver"]}


@pytest.mark.parametrize("index", ALL_CASES)
def test_intensities_are_like_hounsfield_units(index: int) -> None:
    scan = case(index)
    median = {name: float(np.median(scan.image[scan.labels == value])) for name, value in LABELS.items()}
    corner = scan.image[:, :3, :3]
    assert -1024 <= scan.image.min() < -950
    assert abs(float(np.median(corner)) + 1000) < 40
    assert -30 < median["lesion"] < median["liver"] - 45
    assert 80 < median["liver"] < min(median["spleen"], median["kidneys"]) < median["spine"]
    assert corner.std() > 5  # noise


def test_size_and_spacing_vary_and_stay_small() -> None:
    shapes = [case(index).image.shape for index in ALL_CASES]
    assert len(set(shapes)) > 5
    assert len({case(index).spacing for index in ALL_CASES}) == len(ALL_CASES)
    assert max(max(shape) for shape in shapes) <= 56


def test_nnunet_accepts_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: multiprocessing.dummy)  # threads
    write_dataset(tmp_path / NAME, PhantomSpec(n_training=2, n_test=1))
    verify_dataset_integrity(str(tmp_path / NAME), num_processes=1)


def test_unseen_scans_have_labels_and_numbers_of_their_own(tmp_path: Path) -> None:
    write_dataset(tmp_path / NAME, TWO_CASES)
    names = {folder: sorted(os.listdir(tmp_path / NAME / folder)) for folder in ("labelsTr", "labelsTs")}
    assert names == {"labelsTr": ["phantom_000.nii.gz"], "labelsTs": ["phantom_001.nii.gz"]}
    assert json.loads((tmp_path / NAME / "dataset.json").read_text())["numTraining"] == 1


def test_interrupted_generation_leaves_nothing_that_counts(tmp_path: Path) -> None:
    def interrupt(number: int, _: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / NAME, TWO_CASES, interrupt)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_run_left_is_removed(tmp_path: Path, killed_partial: KilledPartial) -> None:
    left = killed_partial(tmp_path)
    left.mkdir()
    (left / "dataset.json").write_text("{")
    write_dataset(tmp_path / NAME, TWO_CASES)
    assert os.listdir(tmp_path) == [NAME]


def test_file_that_a_full_disk_cut_off_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image = SimpleITK.WriteImage

    def cut_off(image: SimpleITK.Image, path: str, **options: object) -> None:
        write_image(image, path, **options)
        os.truncate(path, os.path.getsize(path) // 2)

    monkeypatch.setattr(phantom.SimpleITK, "WriteImage", cut_off)
    with pytest.raises(UsageError, match=f"can't write .*{NAME}"):
        write_dataset(tmp_path / NAME, TWO_CASES)
    assert os.listdir(tmp_path) == []


def test_lesion_without_room_in_the_organ_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phantom, "LESION", replace(phantom.LESION, radii=(80.0, 80.0, 80.0)))
    with pytest.raises(RuntimeError, match="no room"):
        make_case(SPEC, 0)
