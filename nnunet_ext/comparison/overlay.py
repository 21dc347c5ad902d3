"""Segmentations of a case over its image, in slices through the smallest structure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_cdt

from nnunet_ext.escaping import drawn
from nnunet_ext.style import COLUMN, PAGE, SMALL, legend_below, page, wrapped

# Okabe and Ito (2008), safe for colour-blind readers; the labels' numbers serve greyscale prints.
LABEL_COLOURS = ("#56B4E9", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#E69F00", "#0072B2")
_CT_WINDOW = (-160.0, 240.0)  # HU
_PER_PAGE = 5  # pictures side by side
_MARGIN = 0.25  # inches on the left
_TALLEST = 4.5  # inches of the planes of a picture


@dataclass(frozen=True)
class Scan:
    """An unseen scan with its segmentations.

    Args:
        name: Name of the case.
        image: First channel, (z, y, x).
        spacing: Along z, y, x in mm.
        truth: Labels, (z, y, x).
        predictions: Title -> labels, (z, y, x).
        names: Label -> name.
        is_ct: Whether `image` holds Hounsfield units, which are shown in a fixed window.
    """

    name: str
    image: NDArray[Any]
    spacing: tuple[float, float, float]
    truth: NDArray[Any]
    predictions: Mapping[str, NDArray[Any]]
    names: Mapping[int, str]
    is_ct: bool


@dataclass(frozen=True, kw_only=True)
class _Plane:
    """A slice: `axis` is cut at `index`; the vertical axis of the picture is `vertical`."""

    axis: int
    index: int
    vertical: int

    def cut(self, volume: NDArray[Any]) -> NDArray[Any]:
        return np.take(volume, self.index, self.axis)  # (z, y, x) -> (y, x) or (z, x)


def focus(truth: NDArray[Any]) -> tuple[int, int, int]:
    """Slices (z, y, x) in which the label of the fewest voxels has its largest areas; else the middle."""
    labels, counts = np.unique(truth[truth > 0], return_counts=True)
    if not labels.size:
        z, y, x = (n // 2 for n in truth.shape)
        return z, y, x
    mask = truth == labels[np.argmin(counts)]
    z, y, x = (int(np.argmax(mask.sum(axis=tuple({0, 1, 2} - {axis})))) for axis in range(3))
    return z, y, x


def overlay(scan: Scan, width: float = PAGE) -> Any:
    """Figure with image, reference and predictions, each in a z plane and (of a volume) a y plane."""
    z, y, _ = focus(scan.truth)
    planes = [_Plane(axis=0, index=z, vertical=1), _Plane(axis=1, index=y, vertical=0)]
    planes = planes if scan.truth.shape[0] > 1 else planes[:1]
    titles = {title.partition("\n")[0] for title in scan.predictions}
    shown: list[tuple[str, NDArray[Any] | None]] = [("Image", None), ("Reference", scan.truth)]
    shown += [("\n".join(drawn(line, titles) for line in t.splitlines()), p) for t, p in scan.predictions.items()]
    extent = [n * step for n, step in zip(scan.truth.shape, scan.spacing, strict=True)]
    heights = [min(max(extent[plane.vertical] / extent[2], 0.3), 2.2) for plane in planes]  # per width, of its place
    blocks = math.ceil(len(shown) / (_PER_PAGE if width > COLUMN else 2))  # one below the other
    columns = math.ceil(len(shown) / blocks)
    side = min((width - _MARGIN) / columns, _TALLEST / sum(heights))
    names = ["\n".join(wrapped(line, 0.93 * side) for line in title.split("\n")) for title, _ in shown]
    lines = 1 + max(name.count("\n") for name in names)
    high = side * sum(heights) + 0.14 * lines + 0.1 * len(planes)
    with page(blocks * high + 0.35, round(columns * side + _MARGIN, 3)) as figure:
        ratios = {"height_ratios": heights * blocks}
        axes = figure.subplots(len(planes) * blocks, columns, squeeze=False, gridspec_kw=ratios)
        for axis in axes.flat:
            axis.set_axis_off()
        for place, (name, (_, labels)) in enumerate(zip(names, shown, strict=True)):
            block, column = divmod(place, columns)
            for row, plane in enumerate(planes, start=block * len(planes)):
                axis = axes[row][column]
                _show(axis, plane, scan, labels)
                if plane is planes[0]:
                    axis.set_title(name, fontsize=SMALL)
                if column == 0:
                    where = f"{'zyx'[plane.axis]} = {(plane.index + 0.5) * scan.spacing[plane.axis]:.0f} mm"
                    axis.text(-0.04, 0.5, where, transform=axis.transAxes, rotation=90, ha="right", va="center")
        _scale_bar(axes[0][0], extent[2])
        _label_legend(figure, scan, planes)
    return figure


def _scale_bar(axis: Any, width: float) -> None:
    """Draw a bar of a round length, at most a third of the picture's width, in mm."""
    from matplotlib.patheffects import withStroke

    lengths = (step * 10.0**power for power in range(5, -5, -1) for step in (5, 2, 1))
    length = next(length for length in lengths if 3 * length <= width)
    edge = {"transform": axis.get_xaxis_transform(), "path_effects": [withStroke(linewidth=2.5, foreground="black")]}
    axis.plot([0.06 * width, 0.06 * width + length], [0.06, 0.06], color="white", linewidth=1.5, **edge)
    axis.text(0.06 * width, 0.09, f"{length:g} mm", color="white", fontsize=6.5, va="bottom", **edge)


def _show(axis: Any, plane: _Plane, scan: Scan, labels: NDArray[Any] | None) -> None:
    """Draw the slice of the image and, above it, areas, outlines and numbers of the labels."""
    low, high = _CT_WINDOW if scan.is_ct else np.percentile(scan.image, (1, 99))
    picture, down = plane.cut(scan.image), scan.spacing[plane.vertical]
    height, width = picture.shape[0] * down, picture.shape[1] * scan.spacing[2]
    bottom_up = plane.vertical == 0  # z grows to the head, y to the back
    extent = (0, width, 0, height) if bottom_up else (0, width, height, 0)
    origin = "lower" if bottom_up else "upper"
    look = {"cmap": "gray", "vmin": low, "vmax": high, "interpolation": "bicubic"}
    axis.imshow(picture, extent=extent, origin=origin, **look)
    if labels is not None:
        areas = np.pad(plane.cut(labels), 1)  # a border of background closes the outlines
        rows = (np.arange(areas.shape[0]) - 0.5) * down
        columns = (np.arange(areas.shape[1]) - 0.5) * scan.spacing[2]
        for label in _present(areas):
            _draw_label(axis, label, areas == label, rows, columns)
    axis.set(xlim=extent[:2], ylim=extent[2:])


def _draw_label(axis: Any, label: int, mask: NDArray[np.bool_], rows: NDArray[Any], columns: NDArray[Any]) -> None:
    """Draw the area, its outline and, where it is thickest, its number."""
    from matplotlib.patheffects import withStroke

    colours = [_colour(label)]
    axis.contourf(columns, rows, mask, levels=[0.5, 1.5], colors=colours, alpha=0.4)
    axis.contour(columns, rows, mask, levels=[0.5], colors=colours, linewidths=1.1)
    row, column = _deepest(mask)
    outline = [withStroke(linewidth=1.4, foreground="white")]
    axis.text(columns[column], rows[row], str(label), fontsize=6.5, ha="center", va="center", path_effects=outline)


def _deepest(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """A pixel that lies as far from the mask's border as any; the mask's own border is background."""
    depth = distance_transform_cdt(mask, "taxicab")
    pixels = np.argwhere(depth == depth.max())
    row, column = pixels[len(pixels) // 2]
    return int(row), int(column)


def _label_legend(figure: Any, scan: Scan, planes: list[_Plane]) -> None:
    from matplotlib.patches import Patch

    volumes = [scan.truth, *scan.predictions.values()]
    labels = sorted({label for plane in planes for volume in volumes for label in _present(plane.cut(volume))})
    handles = [
        Patch(
            facecolor=_colour(label),
            edgecolor="black",
            linewidth=0.5,
            label=f"{label} {drawn(scan.names.get(label, ''), scan.names.values())}",
        )
        for label in labels
    ]
    legend_below(figure, handles)


def _present(areas: NDArray[Any]) -> list[int]:
    return [int(label) for label in np.unique(areas) if label > 0]


def _colour(label: int) -> str:
    return LABEL_COLOURS[(label - 1) % len(LABEL_COLOURS)]
