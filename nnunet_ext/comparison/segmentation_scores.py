"""Scores of segmentation files against references: Dice as nnU-Net computes it, surface distances in mm.

Surface distances are DeepMind's (Nikolov et al. 2018, arXiv:1809.04430; package `surface-distance`), the norm of
nnU-Net's own comparisons (Isensee et al. 2024, arXiv:2404.09556): surfaces are made of elements with an area, distances
count by area. NSD is the share of both surfaces that lies within a tolerance of the other; HD95 the larger of the two
95th percentiles of distance. Where neither side holds a structure both are NaN; where one side does not, NSD is 0 and
HD95, which no number describes, NaN. Voxels of the ignore label are left out of all scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_ext.comparison.scores import COUNTS, structures
from nnunet_ext.errors import UsageError
from nnunet_ext.parallel import mapped
from nnunet_ext.whole import check_whole

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prediction to score.

    Args:
        case: Its name.
        prediction, reference: Files of label maps of equal shape.
        dataset: Content of dataset.json.
        tolerance: Tolerance of NSD in mm; None: no surface distances.
    """

    case: str
    prediction: Path
    reference: Path
    dataset: dict[str, Any]
    tolerance: float | None


def score(jobs: Sequence[Job], processes: int, on_progress: Progress) -> list[dict[str, Any]]:
    """Rows of all jobs in their order: case, structure, Dice, IoU, counts, and NSD, HD95 where asked for.

    Raises:
        UsageError: a file can't be read, or its shape differs from its reference's.
    """
    rows: list[dict[str, Any]] = []
    for done, found in enumerate(mapped(score_case, jobs, processes), start=1):
        rows += found
        on_progress(done, len(jobs))
    return rows


def score_case(job: Job) -> list[dict[str, Any]]:
    """Rows of one job, one per structure."""
    from nnunetv2.evaluation.evaluate_predictions import region_or_label_to_mask

    reference, spacing = read_labels(job.reference, job.dataset)
    prediction, _ = read_labels(job.prediction, job.dataset)
    if reference.shape != prediction.shape:
        raise UsageError(
            f"{job.prediction} must have the shape {reference.shape} of its reference, got {prediction.shape}: "
            f"it belongs to another image than {job.reference}, or was not resampled back."
        )
    ignore = job.dataset["labels"].get("ignore")
    counted = np.ones(reference.shape, dtype=bool) if ignore is None else reference != ignore
    rows = []
    for key, name in structures(job.dataset["labels"]).items():
        truth = region_or_label_to_mask(reference, key) & counted
        found = region_or_label_to_mask(prediction, key) & counted
        row: dict[str, Any] = {"case": job.case, "structure": name, **overlap(truth, found)}
        if job.tolerance is not None:
            row |= surface(truth, found, spacing, job.tolerance)
        rows.append(row)
    return rows


def read_labels(path: Path, dataset: dict[str, Any]) -> tuple[NDArray[Any], tuple[float, ...]]:
    """Labels (z, y, x), or (y, x) of a single slice, and their spacing in mm, by nnU-Net's own reader.

    Raises:
        UsageError: the file can't be read.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    try:
        check_whole(path)
        reader = determine_reader_writer_from_dataset_json(dataset, str(path), verbose=False)()
        labels, properties = reader.read_seg(str(path))
    except Exception as error:  # readers of many formats, each with errors of its own
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise UsageError(f"{path} can't be read as a label map ({reason[0]}): predict or copy it again.") from error
    labels, spacing = labels[0], tuple(float(step) for step in properties["spacing"])
    return (labels[0], spacing[1:]) if labels.shape[0] == 1 else (labels, spacing)


def overlap(truth: NDArray[np.bool_], found: NDArray[np.bool_]) -> dict[str, float]:
    """Dice, IoU and counts of two masks of one shape; NaN where both are empty."""
    from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn

    tp, fp, fn, _ = map(int, compute_tp_fp_fn_tn(truth, found))
    total = tp + fp + fn
    ratios = (2 * tp / (tp + total), tp / total) if total else (math.nan, math.nan)
    return dict(zip(("Dice", "IoU", *COUNTS), (*ratios, tp, fp, fn), strict=True))


def surface(
    truth: NDArray[np.bool_], found: NDArray[np.bool_], spacing: Sequence[float], tolerance: float
) -> dict[str, float]:
    """NSD and HD95 of two masks of one shape.

    Args:
        truth, found: (z, y, x) or (y, x).
        spacing: Mm per voxel along each axis.
        tolerance: Tolerance of NSD in mm.
    """
    import surface_distance

    if not truth.any() or not found.any():
        return {"NSD": 0.0 if truth.any() or found.any() else math.nan, "HD95": math.nan}
    distances = surface_distance.compute_surface_distances(truth, found, spacing)
    return {
        "NSD": float(surface_distance.compute_surface_dice_at_tolerance(distances, tolerance)),
        "HD95": float(surface_distance.compute_robust_hausdorff(distances, 95)),
    }
