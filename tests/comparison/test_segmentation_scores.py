"""Surface distances and Dice of files against independent computations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from nnunet_ext.comparison.segmentation_scores import Job, overlap, read_labels, score, surface
from nnunet_ext.errors import UsageError
from tests.comparison.conftest import DATASET

BOX = np.zeros((24, 24, 24), dtype=bool)
BOX[6:18, 6:18, 6:18] = True


def write(path: Path, labels: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Path:
    image = sitk.GetImageFromArray(labels.astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(path))
    return path


def job(prediction: Path, reference: Path, dataset: dict[str, Any] = DATASET) -> Job:
    return Job(case="case", prediction=prediction, reference=reference, dataset=dataset, tolerance=1.0)


@pytest.mark.parametrize(("spacing", "shift_mm"), [((1.0, 1.0, 1.0), 3.0), ((2.5, 1.0, 1.0), 7.5)])
def test_shifted_box_has_its_shift_as_distance(spacing: tuple[float, ...], shift_mm: float) -> None:
    found = surface(BOX, np.roll(BOX, 3, axis=0), spacing, 1.0)
    # two of six faces of each box are moved, so that more than 5 % of the surface lies at the whole distance
    assert found["HD95"] == pytest.approx(shift_mm)


def test_nsd_is_the_share_of_the_surface_within_the_tolerance() -> None:
    shifted = np.roll(BOX, 3, axis=0)
    # A face of 12 x 12 of each box moves by 3 mm, and so do 3 mm of the four sides; the rest touches.
    face, sides = 12 * 12, 4 * 12 * 12
    moved = 2 * face + 4 * 12 * 3
    assert surface(BOX, shifted, (1, 1, 1), 0.0)["NSD"] == pytest.approx(
        1 - (moved + 0.0) / (2 * face + sides), abs=0.1
    )
    assert surface(BOX, shifted, (1, 1, 1), 3.0)["NSD"] == 1.0


def test_hd95_is_near_that_of_surface_voxels() -> None:
    random = np.random.default_rng(0)
    blob = ndimage.gaussian_filter(random.normal(size=(32, 32, 32)), 3) > 0.01
    other = ndimage.binary_dilation(blob, iterations=2)
    spacing = (2.0, 1.0, 1.0)

    def border_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        borders = [mask & ~ndimage.binary_erosion(mask) for mask in (a, b)]
        return ndimage.distance_transform_edt(~borders[1], sampling=spacing)[borders[0]]

    expected = max(np.percentile(border_distances(*pair), 95) for pair in ((blob, other), (other, blob)))
    assert surface(blob, other, spacing, 1.0)["HD95"] == pytest.approx(expected, abs=1.0)


def test_empty_masks_follow_the_stated_policy() -> None:
    empty = np.zeros_like(BOX)
    assert overlap(BOX, empty) == {"Dice": 0.0, "IoU": 0.0, "TP": 0, "FP": 0, "FN": BOX.sum()}
    assert math.isnan(overlap(empty, empty)["Dice"])
    one, both = surface(BOX, empty, (1, 1, 1), 1.0), surface(empty, empty, (1, 1, 1), 1.0)
    assert one["NSD"] == 0.0
    assert math.isnan(one["HD95"])
    assert math.isnan(both["NSD"])
    assert math.isnan(both["HD95"])


def test_mask_at_the_border_of_the_image_has_a_closed_surface() -> None:
    full = np.ones((6, 6, 6), dtype=bool)
    assert surface(full, full, (1, 1, 1), 0.5) == {"NSD": 1.0, "HD95": 0.0}


def test_files_are_scored_in_their_own_spacing_and_ignore_label_is_left_out(tmp_path: Path) -> None:
    reference, prediction = BOX * 1, np.roll(BOX, 2, axis=2) * 1
    dataset = {**DATASET, "labels": {"background": 0, "organ": 1, "ignore": 2}}
    plain = score(
        [job(write(tmp_path / "p.nii.gz", prediction), write(tmp_path / "r.nii.gz", reference), dataset)],
        1,
        lambda *_: None,
    )
    assert plain[0]["Dice"] == pytest.approx(10 / 12)
    reference[:, :, 18:] = 2
    reference[:, :, :8] = 2
    kept = score([job(tmp_path / "p.nii.gz", write(tmp_path / "i.nii.gz", reference), dataset)], 1, lambda *_: None)
    assert kept[0]["Dice"] == 1.0
    assert (kept[0]["FP"], kept[0]["FN"]) == (0, 0)
    wide = score(
        [
            job(
                write(tmp_path / "p2.nii.gz", prediction, (1, 1, 3.0)),
                write(tmp_path / "r2.nii.gz", BOX * 1, (1, 1, 3.0)),
                dataset,
            )
        ],
        1,
        lambda *_: None,
    )
    assert wide[0]["HD95"] == pytest.approx(6.0)


def test_dice_is_that_of_nnunet(tmp_path: Path) -> None:
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    random = np.random.default_rng(3)
    files = [write(tmp_path / f"{name}.nii.gz", random.integers(0, 4, (8, 9, 10))) for name in "pr"]
    dataset = {**DATASET, "labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}}
    rows = score([job(files[0], files[1], dataset)], 1, lambda *_: None)
    theirs = compute_metrics(str(files[1]), str(files[0]), SimpleITKIO(), [(1, 2), (2,)], 3)["metrics"]
    for row, expected in zip(rows, theirs.values(), strict=True):
        assert {name: row[name] for name in ("Dice", "IoU", "TP", "FP", "FN")} == pytest.approx(
            {name: expected[name] for name in ("Dice", "IoU", "TP", "FP", "FN")}
        )


def test_single_slice_is_measured_in_two_dimensions(tmp_path: Path) -> None:
    slices = [write(tmp_path / f"{n}.nii.gz", np.roll(BOX[10:11], n, axis=1) * 1, (5.0, 2.0, 2.0)) for n in (0, 2)]
    labels, spacing = read_labels(slices[0], DATASET)
    assert (labels.shape, spacing) == ((24, 24), (2.0, 2.0))
    assert score([job(slices[1], slices[0])], 1, lambda *_: None)[0]["HD95"] == pytest.approx(4.0)


def test_processes_give_the_same_rows_in_the_same_order(tmp_path: Path) -> None:
    reference = write(tmp_path / "r.nii.gz", BOX * 1)
    jobs = [job(write(tmp_path / f"{n}.nii.gz", np.roll(BOX, n, axis=0) * 1), reference) for n in range(3)]
    done: list[tuple[int, int]] = []
    alone, together = score(jobs, 1, lambda *_: None), score(jobs, 2, lambda *n: done.append(n))
    np.testing.assert_equal(alone, together)
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_other_shape_and_unreadable_file_are_named(tmp_path: Path) -> None:
    reference, small = write(tmp_path / "r.nii.gz", BOX * 1), write(tmp_path / "s.nii.gz", BOX[2:] * 1)
    with pytest.raises(
        UsageError, match=r"s.nii.gz must have the shape \(24, 24, 24\) of its reference, got \(22, 24, 24\)"
    ):
        score([job(small, reference)], 1, lambda *_: None)


def test_cut_off_file_is_named_though_itk_would_read_it(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 3, BOX.shape)
    reference, broken = write(tmp_path / "r.nii.gz", labels), tmp_path / "b.nii.gz"
    broken.write_bytes(reference.read_bytes()[:-500])
    sitk.ReadImage(str(broken))  # no error
    with pytest.raises(UsageError, match=r"b.nii.gz can't be read as a label map .*predict or copy it again") as caught:
        score([job(broken, reference)], 1, lambda *_: None)
    assert "\n" not in str(caught.value)
