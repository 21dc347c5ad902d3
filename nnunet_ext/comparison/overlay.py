"""Segmentations of a case over its image, in slices through the smallest structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_cdt

from nnunet_ext.escaping import drawn
from nnunet_ext.style import page, png

# Okabe and Ito (2008), safe for colour-blind readers; the labels' numbers serve greyscale prints.
LABEL_COLOURS = ("#56B4E9", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#E69F00", "#0072B2")
_CT_WINDOW = (-160.0, 240.0)  # HU


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


def overlay(scan: Scan) -> bytes:
    """PNG with the columns image, reference, predictions and the rows z plane and (of a volume) y plane."""
    z, y, _ = focus(scan.truth)
    planes = (
        [_Plane(axis=0, index=z, vertical=1), _Plane(axis=1, index=y, vertical=0)]
        if scan.truth.shape[0] > 1
        else [_Plane(axis=0, index=z, vertical=1)]
    )
    columns: list[tuple[str, NDArray[Any] | None]] = [("Image", None), ("Reference", scan.truth)]
    columns += scan.predictions.items()
    names = {title.partition("\n")[0] for title in scan.predictions}
    extent = [n * step for n, step in zip(scan.truth.shape, scan.spacing, strict=True)]
    heights = [extent[plane.vertical] / extent[2] for plane in planes]
    size = (1.95 * len(columns) + 0.5, 1.85 * sum(heights) + 1.0)
    grid = {"height_ratios": heights}
    with page(size[1], size[0]) as figure:
        axes = figure.subplots(len(planes), len(columns), squeeze=False, sharex=True, sharey="row", gridspec_kw=grid)
        for row, plane in zip(axes, planes, strict=True):
            for axis, (title, labels) in zip(row, columns, strict=True):
                _show(axis, plane, scan, labels)
                shown = "\n".join(drawn(line, names) for line in title.splitlines())
                axis.set_title(shown if plane is planes[0] else "")
            place = (plane.index + 0.5) * scan.spacing[plane.axis]
            row[0].set_ylabel(f"{'zyx'[plane.axis]} = {place:.0f} mm\n{'zyx'[plane.vertical]} [mm]")
        for axis in axes[-1]:
            axis.set_xlabel("x [mm]")
        _label_legend(figure, scan, planes)
        return png(figure, legend=0.28)


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
    axis.tick_params(length=2, width=0.6)


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
    figure.legend(handles=handles, loc="lower center", ncol=max(1, min(len(handles), 8)), frameon=False)


def _present(areas: NDArray[Any]) -> list[int]:
    return [int(label) for label in np.unique(areas) if label > 0]


def _colour(label: int) -> str:
    return LABEL_COLOURS[(label - 1) % len(LABEL_COLOURS)]
