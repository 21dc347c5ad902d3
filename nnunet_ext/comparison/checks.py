"""Reasons why a comparison may not be fair: sentences, in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from nnunet_ext.comparison.places import Places
from nnunet_ext.comparison.run_folders import Run
from nnunet_ext.comparison.scores import common_cases
from nnunet_ext.comparison.statistics import FEWEST_CASES
from nnunet_ext.comparison.training import Training
from nnunet_ext.printable import counted, first_few

_ROUNDING = 1e-3  # of a Dice that was computed from its counts


def of_scores(scores: pd.DataFrame) -> list[str]:
    """Cases, folds and references that differ between the runs, and structures that were invented."""
    common, warnings = common_cases(scores), []
    for label, own in scores.groupby("run", sort=False):
        surplus = sorted(set(own["case"]) - set(common))
        if surplus:
            warnings.append(
                f"{label}: left out, because another run lacks them: {len(surplus)} of "
                f"{counted(own['case'].nunique(), 'case')} ({first_few(surplus)})."
            )
    kept = scores[scores["case"].isin(common)]
    folds = kept.groupby("case")["fold"].nunique()
    moved = sorted(folds.index[folds > 1])
    if moved:
        warnings.append(
            f"In different folds of different runs, whose splits thus differ: {counted(len(moved), 'case')} "
            f"({first_few(moved)})."
        )
    voxels = kept.assign(voxels=kept["TP"] + kept["FN"]).groupby(["case", "structure"])["voxels"].nunique()
    changed = sorted({case for case, _ in voxels.index[voxels > 1]})
    if changed:
        warnings.append(
            f"The references of {counted(len(changed), 'case')} differ between the runs (other numbers of voxels), so "
            f"their Dice can't be compared; evaluate all runs against one set of references: {first_few(changed)}."
        )
    if len(common) < FEWEST_CASES:
        warnings.append(f"Compared: {counted(len(common), 'case')} only.")
    return [*warnings, *_contradictory(kept), *_failed(kept), *_invented(kept)]


def contradictory(kept: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows of each run whose Dice does not follow from its counts: edited, or not of nnU-Net."""
    with_counts = kept[kept[["TP", "FP", "FN"]].notna().all(axis="columns")]
    expected = 2 * with_counts["TP"] / (2 * with_counts["TP"] + with_counts["FP"] + with_counts["FN"])  # 0 / 0 is NaN
    odd = with_counts[
        ((with_counts["Dice"] - expected).abs() > _ROUNDING) | (with_counts["Dice"].isna() != expected.isna())
    ]
    return {str(label): rows for label, rows in odd.groupby("run", sort=False)}


def _contradictory(kept: pd.DataFrame) -> list[str]:
    return [
        f"{label}: the Dice of {counted(len(rows), 'score')} does not follow from its TP, FP and FN, validate again: "
        f"{first_few(sorted(set(rows['case'])))}."
        for label, rows in contradictory(kept).items()
    ]


def _failed(kept: pd.DataFrame) -> list[str]:
    """A run that never finds a structure has probably not learned it, which no statistics say."""
    present = kept[kept["TP"] + kept["FN"] > 0]
    found = (present["TP"] + present["FP"] > 0).groupby([present["run"], present["structure"]], sort=False).any()
    return [
        f"{label}: finds {structure} in no case at all; its training may have failed or been too short."
        for label, structure in found.index[~found]
    ]


def _invented(kept: pd.DataFrame) -> list[str]:
    """A structure found where the reference has none gives Dice 0, left out by the run that finds none."""
    absent = kept[(kept["TP"] + kept["FN"] == 0) & (kept["FP"] > 0)]
    return [
        f"{label}: finds {structure} in {counted(len(rows), 'case')} without it: a Dice of 0 there, and none "
        "for a run that rightly finds nothing."
        for (label, structure), rows in absent.groupby(["run", "structure"], sort=False)
    ]


def of_files(run: Run, scores: pd.DataFrame, places: Places) -> list[str]:
    """Cases of nnU-Net's split, and segmentations, that a run's summaries don't know."""
    warnings = []
    ending = str(run.dataset["file_ending"])
    for fold, own in scores.groupby("fold", sort=False):
        cases = set(own["case"])
        where = f"{run.label}, fold {fold}"
        files = (run.fold_folder(str(fold)) / "validation").glob(f"*{ending}")
        segmented = {path.name.removesuffix(ending) for path in files}
        if unscored := sorted(segmented - cases):
            warnings.append(
                f"{where}: not in summary.json, validate the fold again: {counted(len(unscored), 'segmentation')} "
                f"({first_few(unscored)})."
            )
        expected = places.validation_cases(str(run.plans.get("dataset_name")), str(fold))
        if expected is None:
            continue
        missing, surplus = sorted(set(expected) - cases), sorted(cases - set(expected))
        if missing:
            warnings.append(
                f"{where}: missing of splits_final.json: {counted(len(missing), 'case')} ({first_few(missing)})."
            )
        if surplus:
            warnings.append(
                f"{where}: not held back by splits_final.json, so perhaps trained on: "
                f"{counted(len(surplus), 'case')} ({first_few(surplus)})."
            )
    return warnings


def of_settings(runs: Sequence[Run], trainings: Mapping[str, Training]) -> list[str]:
    """Differences in what the runs were given and `gate` does not look at: data set and machine."""

    def differing(what: str, describe: Callable[[Run], object]) -> list[str]:
        values = {run.label: str(describe(run)) for run in runs}
        if len(set(values.values())) < 2:
            return []
        return [f"The runs differ in {what}: {'; '.join(f'{label}: {value}' for label, value in values.items())}."]

    return [
        *differing("data set", lambda run: run.plans.get("dataset_name")),
        *differing("GPU or PyTorch", lambda run: ", ".join(sorted(trainings[run.label].machines))),
    ]


def of_predictions(label: str, predicted: set[str], referenced: set[str], folder: Path) -> list[str]:
    """Held-out cases that have a prediction or a reference only."""
    warnings = []
    if missing := sorted(referenced - predicted):
        warnings.append(
            f"{label}: without a prediction in {folder}: {counted(len(missing), 'reference')} ({first_few(missing)})."
        )
    if surplus := sorted(predicted - referenced):
        warnings.append(
            f"{label}: without a reference: {counted(len(surplus), 'prediction')} in {folder} ({first_few(surplus)})."
        )
    return warnings
