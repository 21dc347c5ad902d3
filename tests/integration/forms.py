"""Data sets of the matrix in nnU-Net's raw format: generated phantoms and real data, in several kinds of labels.

The four kinds of labels are those of nnU-Net's own integration tests: plain, one class that becomes the ignore label,
regions, and regions of which only some slices are labelled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from nnunet_ext.errors import UsageError

BOTH = {"background": 0, "hippocampus": [1, 2], "anterior": 1}
LABELS: dict[str, dict[str, Any]] = {
    "plain": {"labels": {"background": 0, "anterior": 1, "posterior": 2}},
    "ignore": {"labels": {"background": 0, "anterior": 1, "ignore": 2}},
    "regions": {"labels": BOTH, "regions_class_order": [2, 1]},
    "regions-ignore": {"labels": {**BOTH, "ignore": 3}, "regions_class_order": [2, 1]},
}
SLICES = 8  # of "regions-ignore" every eighth along each axis is labelled
ENDING = ".nii.gz"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where images come from.

    Args:
        name: Short name.
        folder: Name of the real data set; empty for phantoms.
        kinds: Kinds of labels, of `LABELS`; empty: the data set's own.
        n_training: Cases to train and validate on.
        n_unseen: Cases to predict.
        voxel: Spacing in mm to which images and labels are resampled; 0: as they are.
        spacing: Target spacing of 3D configurations in mm; empty: nnU-Net's own choice.
        patch: Patch of 3d_fullres; empty: as planned.
        schedule: Suffix of all trainers' names.
    """

    name: str
    folder: str = ""
    kinds: tuple[str, ...] = ()
    n_training: int
    n_unseen: int
    voxel: float = 0.0
    spacing: tuple[float, ...] = ()
    patch: tuple[int, ...] = ()
    schedule: str = "_1epochs_2iters_NoMirroring"


SOURCES = (
    Source(
        name="phantom",
        kinds=tuple(LABELS),
        n_training=4,
        n_unseen=1,
        patch=(8, 24, 20),  # smaller than the images, so that windows overlap
        schedule="_1epochs_2iters",
    ),
    Source(name="hippocampus", folder="Dataset004_Hippocampus", kinds=tuple(LABELS), n_training=6, n_unseen=2),
    # Whole brains at 3 mm: nnU-Net writes and reads probabilities of all voxels, which takes minutes a trainer at 1 mm.
    Source(
        name="brats",
        folder="Dataset015_BraTS",
        n_training=4,
        n_unseen=1,
        voxel=3.0,
        spacing=(4.0, 4.0, 4.0),
        patch=(24, 32, 32),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """One data set of the matrix.

    Args:
        source: Where its images come from.
        kind: Kind of labels, of `LABELS`; "own": the real data set's.
        number: Number of the data set.
    """

    source: Source
    kind: str
    number: int

    @property
    def name(self) -> str:
        """Name as the user selects it."""
        return f"{self.source.name}-{self.kind}"

    @property
    def dataset(self) -> str:
        """Name of nnU-Net's data set."""
        return f"Dataset{self.number}_{self.name.replace('-', '_')}"


FORMS = tuple(
    Form(source=source, kind=kind, number=700 + 10 * i + j)
    for i, source in enumerate(SOURCES)
    for j, kind in enumerate(source.kinds or ("own",))
)


def write_raw(form: Form, folder: Path, data: Path | None) -> None:
    """Write a data set, in place of one that is there.

    Args:
        form: The data set.
        folder: Where it is to be.
        data: Folder of the real data sets.

    Raises:
        UsageError: the real data set is not there, or has too few cases.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True)
    if form.source.folder:
        if data is None:
            raise UsageError(f"{form.name} needs --data, the folder that holds {form.source.folder}: name it.")
        description = _take_real(form, folder, data / form.source.folder)
    else:
        description = _write_phantoms(form, folder)
    if form.kind != "own":
        description = {key: description[key] for key in ("channel_names", "file_ending")} | LABELS[form.kind]
    if form.kind == "regions-ignore":
        for path in sorted((folder / "labelsTr").iterdir()):
            _keep_slices(path, LABELS[form.kind]["labels"]["ignore"])
    content = {**description, "numTraining": form.source.n_training}
    (folder / "dataset.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def _take_real(form: Form, folder: Path, real: Path) -> dict[str, Any]:
    """Take images and labels of the first cases; return the content of dataset.json."""
    source, needed = form.source, form.source.n_training + form.source.n_unseen
    path = real / "dataset.json"
    if not path.is_file():
        raise UsageError(f"{form.name} needs {real} in nnU-Net's raw format, {path} is not there: correct --data.")
    description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    ending = description["file_ending"]
    cases = sorted(label.name.removesuffix(ending) for label in (real / "labelsTr").glob(f"*{ending}"))[:needed]
    if len(cases) < needed:
        raise UsageError(f"{form.name} needs {needed} cases, {real} has {len(cases)}: name a folder with all of them.")
    for i, case in enumerate(cases):
        part = "imagesTr" if i < source.n_training else "imagesTs"
        for image in sorted((real / "imagesTr").glob(f"{case}_????{ending}")):
            _take(image, folder / part / image.name, source.voxel, sitk.sitkLinear)
        if i < source.n_training:
            label = f"{case}{ending}"
            _take(real / "labelsTr" / label, folder / "labelsTr" / label, source.voxel, sitk.sitkNearestNeighbor)
    return description


def _take(path: Path, target: Path, voxel: float, interpolator: int) -> None:
    """Copy a file, or resample it to this spacing."""
    if not voxel:
        shutil.copyfile(path, target)
        return
    image = sitk.ReadImage(str(path))
    grid = sitk.ResampleImageFilter()
    grid.SetReferenceImage(image)
    grid.SetOutputSpacing([voxel] * 3)
    grid.SetSize([round(n * old / voxel) for n, old in zip(image.GetSize(), image.GetSpacing(), strict=True)])
    grid.SetInterpolator(interpolator)
    sitk.WriteImage(grid.Execute(image), str(target))


def _write_phantoms(form: Form, folder: Path) -> dict[str, Any]:
    """Write two channels of each phantom; return the content of dataset.json."""
    for i, (channels, labels) in enumerate(_phantoms(form.source.n_training + form.source.n_unseen)):
        part = "imagesTr" if i < form.source.n_training else "imagesTs"
        for number, channel in enumerate(channels):
            _write(channel, folder / part / f"phantom_{i}_{number:04d}{ENDING}")
        if i < form.source.n_training:
            _write(labels, folder / "labelsTr" / f"phantom_{i}{ENDING}")
    return {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ENDING}


def _phantoms(n: int) -> Iterator[tuple[Sequence[NDArray[np.float32]], NDArray[np.uint8]]]:
    """An ellipsoid whose halves are the two classes, in images of unlike sizes."""
    for seed in range(n):
        random = np.random.default_rng(seed)
        shape = random.integers(0, 3, 3) + np.array([10, 24, 18])
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij"))
        centre = random.uniform(-0.15, 0.15, 3).reshape(3, 1, 1, 1)
        inside = np.square((grid - centre) / 0.6).sum(axis=0) <= 1
        labels = (inside * np.where(grid[1] < centre[1], 1, 2)).astype(np.uint8)
        noise = random.normal(0, 0.4, (2, *shape))
        yield [(labels * (1.0 + channel) + noise[channel]).astype(np.float32) for channel in (0, 1)], labels


def _write(array: NDArray[Any], path: Path) -> None:
    """Write it with a spacing, an origin and a direction that are no default."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.1, 2.5))
    image.SetOrigin((-12.0, 7.5, 40.0))
    image.SetDirection((-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
    sitk.WriteImage(image, str(path))


def _keep_slices(path: Path, ignore: int) -> None:
    """Set labels between the labelled slices to the ignore label."""
    image = sitk.ReadImage(str(path))
    labels = sitk.GetArrayFromImage(image)
    kept = np.zeros(labels.shape, dtype=bool)
    for axis in range(labels.ndim):
        np.moveaxis(kept, axis, 0)[SLICES // 2 :: SLICES] = True
    sparse = sitk.GetImageFromArray(np.where(kept, labels, ignore).astype(labels.dtype))
    sparse.CopyInformation(image)
    sitk.WriteImage(sparse, str(path))
