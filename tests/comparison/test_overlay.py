"""Overlays render for volumes and single slices, for few and many labels, and show what they claim to."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest

from nnunet_ext.comparison.overlay import LABEL_COLOURS, Scan, focus, overlay


def pixels(png: bytes) -> np.ndarray:
    return matplotlib.image.imread(BytesIO(png), format="png")


def luminance(colour: str) -> float:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def scan(shape: tuple[int, int, int] = (12, 20, 24)) -> Scan:
    rng = np.random.default_rng(0)
    truth = np.zeros(shape, dtype=np.uint8)
    truth[:, 3:15, 4:20] = 1
    truth[shape[0] // 2, 6:9, 10:13] = 2
    image = rng.normal(0, 20, shape) + 100 * truth
    names = {1: "organ", 2: "lesion"}
    return Scan("case", image, (5.0, 2.0, 2.0), truth, {"A\nDice 0.9": truth, "B": np.zeros_like(truth)}, names, True)


@pytest.mark.parametrize("shape", [(12, 20, 24), (1, 20, 24), (40, 20, 24)])
def test_overlay_renders(shape: tuple[int, int, int]) -> None:
    picture = pixels(overlay(scan(shape)))
    assert min(picture.shape[:2]) > 200
    assert picture.std() > 0.05


def test_overlay_of_a_volume_has_a_second_row() -> None:
    one, two = (pixels(overlay(scan(shape))).shape[0] for shape in ((1, 20, 24), (12, 20, 24)))
    assert two > 1.3 * one


def test_overlay_has_a_column_for_each_prediction() -> None:
    two = scan()
    three = replace(two, predictions={**two.predictions, "C": two.truth})
    assert pixels(overlay(three)).shape[1] - pixels(overlay(two)).shape[1] == pytest.approx(390, abs=2)


def test_prediction_changes_the_picture() -> None:
    good = scan()
    assert overlay(good) != overlay(replace(good, predictions={"A\nDice 0.9": good.truth * 0, "B": good.truth}))


def test_label_that_fills_the_slice_and_scan_without_labels_render() -> None:
    full = np.ones((4, 8, 8), dtype=np.uint8)
    overlay(replace(scan(), image=full * 1.0, truth=full, predictions={"A": full}, is_ct=False))
    overlay(replace(scan(), truth=scan().truth * 0, predictions={"A": scan().truth * 0}))


def test_more_labels_than_colours_render() -> None:
    many = (np.arange(12 * 20 * 24).reshape(12, 20, 24) // 200).astype(np.int16)
    overlay(replace(scan(), truth=many, predictions={"A": many}))


def test_slices_go_through_the_smallest_structure() -> None:
    truth = np.zeros((10, 11, 12), dtype=np.uint8)
    truth[2:9, 2:9, 2:9] = 1
    truth[7, 3:5, 4:7] = 2
    truth[6, 3, 4] = 2
    assert focus(truth) == (7, 3, 4)
    assert focus(truth * 0) == (5, 5, 6)


def test_colours_of_the_first_labels_differ_in_greyscale() -> None:
    grey = [luminance(colour) for colour in LABEL_COLOURS[:5]]
    neighbours = [abs(a - b) for a, b in pairwise(grey)]
    assert min(neighbours) > 0.05
