"""Looks at one case of a data set through nnU-Net's own reader: what would spoil a training, or a prediction."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nnunet_ext.doctor.finding import Finding, failure, warning
from nnunet_ext.printable import counted, first_few
from nnunet_ext.whole import check_whole

_APART = 0.01  # voxels between two grids that rounding in headers doesn't explain
_OVERLAYS = "see with nnUNetv2_plot_overlay_pngs whether they match; where they do, copy the image's header"


@dataclass(frozen=True)
class Case:
    """Files of one case.

    Args:
        name: Name of the case.
        images: One file per channel, or fewer with several channels each.
        label: None where there is none to be.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True)
class Rules:
    """What holds for all cases.

    Args:
        reader: Class of nnU-Net's reader.
        channels: Number of them.
        foreground: Labels other than the background, without the ignore label.
        ignore: The ignore label, where there is one.
    """

    reader: Any
    channels: int
    foreground: tuple[int, ...] = ()
    ignore: int | None = None

    @property
    def labels(self) -> tuple[int, ...]:
        """All that a label map may hold."""
        return (0, *self.foreground, *(() if self.ignore is None else (self.ignore,)))


@dataclass(frozen=True)
class Look:
    """What a case is like.

    Args:
        name: Name of the case.
        findings: Failures and warnings.
        shape, spacing: Shape and spacing of its image, in the order of nnU-Net's arrays; empty where it can't be read.
        labels: Values that its label map holds.
        digest: Equal for equal images.
    """

    name: str
    findings: tuple[Finding, ...]
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    labels: frozenset[int] = frozenset()
    digest: str = ""


@dataclass(frozen=True)
class _Volume:
    """What the reader made of a file: data (channels, *spatial), and how many NaN and infinities it left out."""

    path: Path
    data: NDArray[Any]
    properties: dict[str, Any]
    hidden: int

    @property
    def non_finite(self) -> int:
        return self.hidden or int(self.data.size - np.isfinite(self.data).sum())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.data.shape[1:])

    @property
    def spacing(self) -> tuple[float, ...]:
        return tuple(float(step) for step in self.properties["spacing"])


def look(job: tuple[Case, Rules]) -> Look:
    """Read all files of a case and check them."""
    case, rules = job
    findings: list[Finding] = []
    reader = rules.reader()
    images = [_read(case, path, lambda name: reader.read_images((name,)), findings) for path in case.images]
    whole = [image for image in images if image is not None]
    label = _read(case, case.label, reader.read_seg, findings) if case.label else None
    if whole and len(whole) == len(images):
        findings += _about_channels(case, whole, rules)
    findings += [found for image in whole for found in _about_values(case, image)]
    labels: frozenset[int] = frozenset()
    if label is not None:
        values = np.sort(pd.unique(label.data.ravel()))  # as nnU-Net; np.unique sorts every voxel
        labels = frozenset(values[np.isin(values, rules.labels)].astype(int).tolist())
        findings += _about_labels(case, label, values, rules)
        findings += _about_grids(case, whole[0], label) if whole else []
    if not whole:
        return Look(case.name, tuple(findings), labels=labels)
    digest = hashlib.blake2b(digest_size=16)
    for image in whole:
        digest.update(np.ascontiguousarray(image.data).data)
    return Look(case.name, tuple(findings), whole[0].shape, whole[0].spacing, labels, digest.hexdigest())


def _read(
    case: Case, path: Path, read: Callable[[str], tuple[NDArray[Any], dict[str, Any]]], findings: list[Finding]
) -> _Volume | None:
    cure = "copy it again from where it comes from, or take the case out"
    if not path.is_file():
        findings.append(failure(case.name, f"{path} is missing", "add it, or take the case out"))
        return None
    said = io.StringIO()  # readers print what is wrong, and raise an empty error
    try:
        hidden = check_whole(path)
        with contextlib.redirect_stdout(said):
            data, properties = read(str(path))
    except Exception as error:  # readers of many formats, each with errors of its own
        lines = (str(error).strip() or said.getvalue().strip() or type(error).__name__).splitlines()
        findings.append(failure(case.name, f"{path} can't be read: {lines[-1].strip()}", cure))
        return None
    if data.ndim != 4 or len(properties["spacing"]) != 3:
        findings.append(
            failure(
                case.name,
                f"{path} is read as an array of {_row(data.shape)} with "
                f"{counted(len(properties['spacing']), 'spacing')}, nnU-Net needs channels and three axes",
                "store every channel, or component of a vector, in a file of its own",
            )
        )
        return None
    return _Volume(path, data, properties, hidden)


def _about_channels(case: Case, images: Sequence[_Volume], rules: Rules) -> Iterator[Finding]:
    count = sum(len(image.data) for image in images)
    if count != rules.channels:
        yield failure(
            case.name,
            f"has {counted(count, 'channel')} in {', '.join(image.path.name for image in images)}, dataset.json has "
            f"{rules.channels} channel_names",
            "add or remove files, or correct channel_names",
        )
    for image in images[1:]:
        yield from _about_grids(case, images[0], image)
    spacing = images[0].spacing
    if not all(step > 0 for step in spacing):
        yield failure(case.name, f"{images[0].path} has the spacing {_row(spacing)}", "correct its header")


def _about_values(case: Case, image: _Volume) -> Iterator[Finding]:
    if image.non_finite:
        yield failure(
            case.name,
            f"{image.path} holds NaN or infinity in {image.non_finite} of {image.data.size} voxels",
            "replace them by a value that means nothing in these images, such as air",
        )
    elif any(channel.min() == channel.max() for channel in image.data):
        yield warning(
            case.name,
            f"{image.path} has the same value, {image.data.flat[0]:g}, everywhere",
            "see whether the export of this scan failed",
        )


def _about_labels(case: Case, label: _Volume, values: NDArray[Any], rules: Rules) -> Iterator[Finding]:
    if len(label.data) != 1:
        yield failure(case.name, f"{label.path} has {counted(len(label.data), 'channel')}", "store one label map")
    if label.non_finite:
        yield failure(case.name, f"{label.path} holds NaN or infinity", "give these voxels a label")
    values = values[np.isfinite(values)]
    fractions = values[values != np.round(values)]
    if fractions.size:
        yield failure(
            case.name,
            f"{label.path} must hold whole numbers, it holds {_some(fractions)}",
            "resample labels with nearest neighbours, store them as integers",
        )
    unknown = np.setdiff1d(values, [*rules.labels, *fractions])
    if unknown.size:
        yield failure(
            case.name,
            f"{label.path} holds the labels {_some(unknown)}, dataset.json has {_some(rules.labels)}",
            "add them to labels, or map them to one that is there",
        )
    if not np.isin(values, rules.foreground).any():
        yield warning(
            case.name,
            f"{label.path} holds no foreground, only {_some(values)}",
            "see whether that is right; take the case out where its annotation was forgotten",
        )


def _about_grids(case: Case, first: _Volume, other: _Volume) -> Iterator[Finding]:
    """Shape, spacing, origin and direction of two files that must lie on each other."""
    cure = f"resample or export it on the grid of {first.path.name}"
    if first.shape != other.shape:
        yield failure(
            case.name, f"{other.path} has the shape {_row(other.shape)}, {first.path} {_row(first.shape)}", cure
        )
        return
    if not np.allclose(first.spacing, other.spacing):
        yield failure(
            case.name, f"{other.path} has the spacing {_row(other.spacing)}, {first.path} {_row(first.spacing)}", cure
        )
        return
    distance = _distance(first, other)
    if distance > _APART:
        yield warning(
            case.name,
            f"{other.path} lies up to {distance:.3g} voxels away from {first.path}: other origin or direction",
            _OVERLAYS,
        )


def _distance(first: _Volume, other: _Volume) -> float:
    """Largest distance of two corners of the same index, in voxels; 0 where the reader knows no place."""
    places = [_affine(volume) for volume in (first, other)]
    if places[0] is None or places[1] is None or places[0].shape != places[1].shape:
        return 0.0
    size = first.shape[::-1][: len(places[0]) - 1]
    corners = np.array([[*corner, 1] for corner in product(*((0, n - 1) for n in size))])
    apart = np.linalg.norm(corners @ (places[0] - places[1]).T, axis=1)
    return float(apart.max() / min(first.spacing))


def _affine(volume: _Volume) -> NDArray[Any] | None:
    """Matrix from indices (x, y, z, 1) to millimetres."""
    properties = volume.properties
    if "nibabel_stuff" in properties:
        found = properties["nibabel_stuff"]
        return np.asarray(found.get("reoriented_affine", found["original_affine"]))
    if "sitk_stuff" not in properties:
        return None
    place = properties["sitk_stuff"]
    dim, most = len(place["spacing"]), min(len(place["spacing"]), 3)  # a fourth axis holds channels
    affine = np.eye(most + 1)
    scaled = np.reshape(place["direction"], (dim, dim)) * place["spacing"]
    affine[:most, :most], affine[:most, most] = scaled[:most, :most], place["origin"][:most]
    return affine


def _row(numbers: Sequence[float]) -> str:
    return "x".join(f"{n:g}" for n in numbers)


def _some(values: Any) -> str:
    return first_few([f"{value:g}" for value in values])
