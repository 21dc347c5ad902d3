"""Data sets as nnU-Net finds them before planning: dataset.json and a fingerprint, no images."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hypothesis import strategies as st

Labels = Literal["labels", "regions", "ignore", "regions and ignore"]
_STATISTICS = {"max": 900.0, "mean": 90.0, "median": 85.0, "min": -900.0, "std": 50.0}
_PERCENTILES = {"percentile_00_5": -800.0, "percentile_99_5": 700.0}


@dataclass(frozen=True, kw_only=True)
class DrawnDataset:
    """One data set.

    Args:
        shape, spacing: Voxels and millimetres per axis of a typical image; an axis of one voxel is 2D for nnU-Net.
        channels: Names of the channels; of CT nnU-Net wants the intensities.
        labels: What kind of labels there are.
        classes: Number of foreground labels.
        cases: Number of images.
        varies: How much images differ from the typical one, as a share.
        seed: Of what differs.
        target: GB of GPU memory.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    channels: tuple[str, ...]
    labels: Labels
    classes: int
    cases: int
    varies: float
    seed: int
    target: float

    @property
    def content(self) -> dict[str, Any]:
        """Content of dataset.json."""
        labels: dict[str, Any] = {f"label {i}": i for i in range(1, self.classes + 1)}
        order = {}
        if self.labels.startswith("regions"):
            labels = {f"region {i}": list(range(i, self.classes + 1)) for i in range(1, self.classes + 1)}
            order = {"regions_class_order": list(range(1, self.classes + 1))}
        ignored = {"ignore": self.classes + 1} if self.labels.endswith("ignore") else {}
        return {
            "channel_names": {str(i): name for i, name in enumerate(self.channels)},
            "labels": {"background": 0, **labels, **ignored},
            **order,
            "numTraining": self.cases,
            "file_ending": ".nii.gz",
            "overwrite_image_reader_writer": "SimpleITKIO",
            "dataset": {f"{i}": {"images": [f"{i}_0000.nii.gz"], "label": f"{i}.nii.gz"} for i in range(self.cases)},
        }

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Content of dataset_fingerprint.json."""
        chosen = random.Random(self.seed)

        def differing(n: float) -> float:
            return n * (1 + self.varies * (2 * chosen.random() - 1))

        each = range(self.cases)
        shapes = [[n if n == 1 else max(1, round(differing(n))) for n in self.shape] for _ in each]
        return {
            "shapes_after_crop": shapes,
            "spacings": [[round(differing(mm), 4) for mm in self.spacing] for _ in each],
            "median_relative_size_after_cropping": 1.0,
            "foreground_intensity_properties_per_channel": {
                str(i): {**_STATISTICS, **_PERCENTILES} for i in range(len(self.channels))
            },
        }

    def write(self, workspace: Path, number: int) -> str:
        """Write both files where nnU-Net looks for them; return the name of the data set."""
        name = f"Dataset{number:03d}_Drawn"
        raw, preprocessed = workspace / "raw" / name, workspace / "preprocessed" / name
        for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
            folder.mkdir(parents=True, exist_ok=True)
        (raw / "dataset.json").write_text(json.dumps(self.content))
        (preprocessed / "dataset.json").write_text(json.dumps(self.content))
        (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(self.fingerprint))
        return name


@st.composite
def datasets(draw: st.DrawFn, *, small: bool = False) -> DrawnDataset:
    """Any data set; `small`: of images that a network of full width trains on in seconds."""
    most, least = (40, 16) if small else (600, 1)
    large, thin = st.integers(20, most), st.integers(least, 20)
    is_thin = draw(st.integers(0, 3)) == 3
    shape = draw(st.tuples(st.one_of(large, thin) if is_thin else large, large, thin if is_thin else large))
    if draw(st.integers(0, 4)) == 4:
        shape = (1, *shape[1:])
    spacings = st.one_of(st.just(1.0), st.floats(0.1, 10.0).map(lambda mm: round(mm, 3)))
    channels = st.lists(st.sampled_from(["CT", "T1", "rescale_to_0_1", "noNorm"]), min_size=1, max_size=5)
    return DrawnDataset(
        shape=shape,
        spacing=draw(st.tuples(spacings, spacings, spacings)),
        channels=tuple(draw(channels)),
        labels=draw(st.sampled_from(["labels", "regions", "ignore", "regions and ignore"])),
        classes=draw(st.integers(1, 3 if small else 12)),
        cases=draw(st.integers(2, 200)),
        varies=draw(st.sampled_from([0.0, 0.1, 0.4])),
        seed=draw(st.integers(0, 99)),
        target=1.5 if small else draw(st.sampled_from([2.0, 4.0, 8.0, 11.0, 24.0, 80.0])),
    )
