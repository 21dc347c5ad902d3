"""Overlays render for volumes and single slices, for few and many labels, and show what they claim to."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from nnunet_ext.comparison.overlay import LABEL_COLOURS, Scan, focus, overlay
from nnunet_ext.style import COLUMN, PAGE, rendered


def pixels(figure: Any) -> np.ndarray:
    return matplotlib.image.imread(BytesIO(rendered(figure, "png")), format="png")


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


def pictures(figure: Any) -> list[Any]:
    return [axis for axis in figure.axes if axis.images]


def test_overlay_of_a_volume_has_a_second_plane() -> None:
    one, two = (len(pictures(overlay(scan(shape)))) for shape in ((1, 20, 24), (12, 20, 24)))
    assert two == 2 * one


@pytest.mark.parametrize("width", [PAGE, COLUMN])
@pytest.mark.parametrize("n", [1, 2, 8])
def test_each_prediction_has_a_picture_of_legible_size(n: int, width: float) -> None:
    two = scan()
    figure = overlay(replace(two, predictions={f"run {i}": two.truth for i in range(n)}), width=width)
    figure.draw_without_rendering()
    assert len(pictures(figure)) == 2 * (n + 2)
    assert {axis.get_title() for axis in pictures(figure)} >= {"Image", "Reference", *(f"run {i}" for i in range(n))}
    assert min(axis.bbox.width for axis in pictures(figure)) > 1.1 * figure.dpi


def test_bar_of_a_round_length_tells_the_scale() -> None:
    first, *others = pictures(overlay(scan()))
    (bar,) = first.lines
    assert np.ptp(bar.get_xdata()) == 10.0  # of 24 x 2 mm
    assert "10 mm" in {text.get_text() for text in first.texts}
    assert not any(axis.lines for axis in others)


def test_prediction_changes_the_picture() -> None:
    good = scan()
    assert not np.array_equal(
        pixels(overlay(good)),
        pixels(overlay(replace(good, predictions={"A\nDice 0.9": good.truth * 0, "B": good.truth}))),
    )


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
