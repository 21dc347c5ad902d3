"""A small CT-like phantom of the abdomen in nnU-Net's raw format, the same on every call.

Organs are ellipsoids in millimetres, each case with its own pose, sizes, attenuation and smooth deformation;
the scanner adds partial volume, a slow bias and correlated noise. It exercises the tool chain: a network that
segments it is no measure of quality on patients.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from nnunet_ext.files import whole_folder

NAME = "Dataset990_CTPhantom"
LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidneys": 3, "spine": 4, "lesion": 5}

# x to the patient's left, y to the back, z to the head (ITK's LPS), in mm from the middle of the abdomen.
Vector = tuple[float, float, float]
Field = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PhantomSpec:
    """What a phantom data set holds.

    Args:
        n_training: Number of cases in imagesTr and labelsTr.
        n_test: Number of unseen cases, in imagesTs and labelsTs.
        field_of_view: Extent of the largest scan along x, y, z in mm.
        spacing: The middle of the voxel sizes along x, y, z in mm.
        seed: Seed of all random numbers.
    """

    n_training: int = 12
    n_test: int = 2
    field_of_view: Vector = (244.0, 192.0, 156.0)
    spacing: Vector = (6.2, 6.2, 6.7)
    seed: int = 20_230_411


@dataclass(frozen=True)
class Tissue:
    """An ellipsoid of one attenuation; an infinite radius makes it a cylinder.

    Args:
        label: Value in the segmentation.
        hu: Attenuation in Hounsfield units.
        centre: Centre in mm.
        radii: Radii in mm.
        vary: How much the place (mm) and, in percent, the radii vary between cases.
    """

    label: int
    hu: float
    centre: Vector
    radii: Vector
    vary: float = 6.0


# Painted in this order: what comes later lies on top. Label 0 here is anatomy that nobody segments.
TISSUES = (
    Tissue(0, -95.0, (0.0, 0.0, 0.0), (114.0, 92.0, math.inf), 3.0),  # subcutaneous fat
    Tissue(0, 55.0, (0.0, 2.0, 0.0), (106.0, 84.0, math.inf), 2.0),  # muscle
    Tissue(0, -60.0, (0.0, -6.0, 0.0), (98.0, 72.0, math.inf), 2.0),  # fat between the organs
    Tissue(0, 45.0, (46.0, -32.0, 24.0), (38.0, 30.0, 40.0), 8.0),  # stomach
    Tissue(0, 45.0, (20.0, -36.0, -55.0), (44.0, 24.0, 30.0), 10.0),  # bowel
    Tissue(0, 45.0, (-40.0, -30.0, -80.0), (40.0, 26.0, 28.0), 10.0),  # bowel
    Tissue(0, 135.0, (9.0, 24.0, 0.0), (10.0, 10.0, math.inf), 3.0),  # aorta
    Tissue(1, 105.0, (-44.0, -14.0, 26.0), (52.0, 52.0, 56.0)),
    Tissue(1, 105.0, (-8.0, -34.0, 38.0), (46.0, 26.0, 30.0)),  # left lobe
    Tissue(2, 160.0, (70.0, 18.0, 28.0), (26.0, 38.0, 40.0)),
    Tissue(3, 215.0, (-56.0, 42.0, -34.0), (23.0, 21.0, 44.0)),
    Tissue(3, 215.0, (58.0, 44.0, -28.0), (23.0, 21.0, 44.0)),
    Tissue(4, 300.0, (0.0, 54.0, 0.0), (22.0, 18.0, math.inf), 3.0),
    Tissue(4, 300.0, (0.0, 80.0, 0.0), (7.0, 12.0, math.inf), 3.0),  # spinous processes
)
LESION = Tissue(LABELS["lesion"], 5.0, (0.0, 0.0, 0.0), (18.0, 18.0, 18.0), 12.0)
AIR = -1000.0


@dataclass(frozen=True)
class PhantomCase:
    """One scan.

    Args:
        image: (z, y, x), int16, Hounsfield units.
        labels: (z, y, x), uint8.
        spacing: Along x, y, z in mm.
    """

    image: NDArray[np.int16]
    labels: NDArray[np.uint8]
    spacing: Vector


def make_case(spec: PhantomSpec, index: int) -> PhantomCase:
    """Make the scan number `index`; the same for the same arguments."""
    rng = np.random.default_rng([spec.seed, index])
    spacing = _vector(np.round(np.asarray(spec.spacing) * rng.uniform(0.9, 1.1, 3), 2))
    extent = np.asarray(spec.field_of_view) * rng.uniform(0.95, 1.0, 3)
    shape = np.floor(extent / np.asarray(spacing)).astype(int)
    points = _deform(rng, _pose(rng, _grid(shape, spacing)))
    hounsfield = np.full(points[0].shape, AIR)
    labels = np.zeros(points[0].shape, dtype=np.uint8)
    attenuation_of_label = rng.normal(0.0, 7.0, len(LABELS))
    for tissue in TISSUES:
        inside = _inside(points, *_varied(rng, tissue))
        hounsfield[inside] = tissue.hu + (attenuation_of_label[tissue.label] if tissue.label else rng.normal(0, 7))
        labels[inside] = tissue.label
    lesion = _place_lesion(rng, points, labels == LABELS["liver"])
    hounsfield[lesion] = LESION.hu + attenuation_of_label[LESION.label]
    labels[lesion] = LESION.label
    return PhantomCase(_scan(rng, hounsfield), labels, spacing)


def write_dataset(folder: Path, spec: PhantomSpec, on_case: Callable[[int, int], None] = lambda _i, _n: None) -> None:
    """Write the data set as `folder`, there only once it is whole; `on_case(number, of)` tells progress.

    Raises:
        UsageError: the folder can't be written.
    """
    total = spec.n_training + spec.n_test
    with whole_folder(folder, replace=True) as partial:
        for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (partial / part).mkdir()
        for index in range(total):
            on_case(index + 1, total)
            part = "Tr" if index < spec.n_training else "Ts"
            case = make_case(spec, index)
            _write(case.image, case.spacing, partial / f"images{part}" / f"phantom_{index:03d}_0000.nii.gz")
            _write(case.labels, case.spacing, partial / f"labels{part}" / f"phantom_{index:03d}.nii.gz")
        description = {
            "name": NAME,
            "description": "CT-like phantom made by nnunet-ext demo",
            "channel_names": {"0": "CT"},
            "labels": LABELS,
            "numTraining": spec.n_training,
            "file_ending": ".nii.gz",
        }
        (partial / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _write(array: NDArray[Any], spacing: Vector, path: Path) -> None:
    """Write and read back: ITK doesn't report every failure of a full disk."""
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing)
    try:
        SimpleITK.WriteImage(image, str(path), useCompression=True)
        whole = np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))), array)
    except RuntimeError as error:
        raise OSError(f"ITK failed on {path.name}") from error
    if not whole:
        raise OSError(f"{path.name} was cut off")


def _vector(values: NDArray[np.float64]) -> Vector:
    x, y, z = (float(value) for value in values)
    return x, y, z


def _grid(shape: NDArray[Any], spacing: Vector) -> Field:
    """Coordinates of the voxels around the middle of the scan: (3, z, y, x), in mm."""
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing, strict=True)]
    z, y, x = np.meshgrid(axes[2], axes[1], axes[0], indexing="ij")
    return np.stack([x, y, z])


def _pose(rng: np.random.Generator, points: Field) -> Field:
    """Turn about z by up to 9 degrees, shift by up to 8 mm and scale by up to 6 %."""
    angle, scale = np.deg2rad(rng.uniform(-9, 9)), rng.uniform(0.94, 1.06)
    x, y, z = points - rng.uniform(-8, 8, 3).reshape(3, 1, 1, 1)
    turned = [x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle), z]
    return np.stack(turned) / scale


def _smooth_field(rng: np.random.Generator, points: Field, wavelength: float) -> Field:
    """A sum of waves of about this length in random directions, with a standard deviation of about 1."""
    field = np.zeros(points.shape[1:])
    for _ in range(6):
        direction = rng.normal(size=3)
        direction *= 2 * np.pi / (wavelength * rng.uniform(0.8, 1.5) * np.linalg.norm(direction))
        field += np.cos(np.tensordot(direction, points, axes=1) + rng.uniform(0, 2 * np.pi))
    return field / math.sqrt(3)


def _deform(rng: np.random.Generator, points: Field) -> Field:
    shifts = [_smooth_field(rng, points, wavelength=110.0) for _ in range(3)]
    return points + 4.5 * np.stack(shifts)


def _varied(rng: np.random.Generator, tissue: Tissue) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return this case's centre and radii of a tissue."""
    centre = np.asarray(tissue.centre) + rng.uniform(-1, 1, 3) * tissue.vary
    radii = np.asarray(tissue.radii) * (1 + rng.uniform(-1, 1, 3) * tissue.vary / 100)
    return centre, radii


def _inside(points: Field, centre: NDArray[np.float64], radii: NDArray[np.float64]) -> NDArray[np.bool_]:
    scaled = (points - centre.reshape(3, 1, 1, 1)) / radii.reshape(3, 1, 1, 1)
    return np.square(scaled).sum(axis=0) <= 1


def _place_lesion(rng: np.random.Generator, points: Field, organ: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Draw places in the organ until the lesion and a margin of 12 mm, above a voxel, lie within it."""
    _, radii = _varied(rng, LESION)
    candidates = points[:, organ]
    for _ in range(500):
        centre = candidates[:, rng.integers(candidates.shape[1])]
        if not np.any(_inside(points, centre, radii + 12) & ~organ):
            return _inside(points, centre, radii)
    raise RuntimeError("The phantom's organ has no room for its lesion.")


def _scan(rng: np.random.Generator, hounsfield: Field) -> NDArray[np.int16]:
    """Add partial volume, a slow bias of some percent and correlated noise of 14 HU."""
    coordinates = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in hounsfield.shape), indexing="ij"))
    bias = 1 + 0.012 * _smooth_field(rng, coordinates, wavelength=3.0)
    noise = _blur(rng.normal(size=hounsfield.shape), 0.5)
    image = (_blur(hounsfield, 0.55) - AIR) * bias + AIR + 14.0 * noise / noise.std()
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)


def _blur(array: Field, sigma: float) -> Field:
    """Gaussian of `sigma` voxels along each axis, the border repeated."""
    blurred: Field = gaussian_filter(array, sigma, radius=2, mode="nearest")
    return blurred
