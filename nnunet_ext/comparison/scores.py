"""Dice and IoU of every case and structure, from nnU-Net's summary.json, checked before anything is computed of them.

A table of scores is a DataFrame with one row per run, case and structure and the columns `COLUMNS`. Dice and IoU are
NaN where neither reference nor prediction holds the structure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_ext.comparison.run_folders import Run, validate_command
from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json

_LONGEST_NAME = 255  # bytes, on all common file systems
COUNTS = ("TP", "FP", "FN")
COLUMNS = ("run", "fold", "case", "structure", "Dice", "IoU", *COUNTS)


def structures(labels: Mapping[str, Any]) -> dict[tuple[int, ...], str]:
    """Foreground labels, or regions, of dataset.json: label values -> name, in the file's order."""
    values = {name: _values(value) for name, value in labels.items() if name != "ignore"}
    return {value: name for name, value in values.items() if value != (0,)}


def _values(label: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in label) if isinstance(label, (list, tuple)) else (int(label),)


def read_validation(run: Run) -> pd.DataFrame:
    """Scores of the validation cases of all folds of a run.

    Raises:
        UsageError: a summary.json is cut off, of another tool or of other labels, or a case is in two folds.
    """
    rows: list[dict[str, Any]] = []
    for fold in run.folds:
        path = run.fold_folder(fold) / "validation" / "summary.json"
        cure = f"validate the fold again by `{validate_command(run, fold)}`, or leave it out by -f"
        rows += [{"run": run.label, "fold": fold, **row} for row in read_summary(path, run.dataset, cure)]
    scores = pd.DataFrame(rows, columns=list(COLUMNS))
    twice = scores[scores.duplicated(["case", "structure"])]
    if not twice.empty:
        case = twice["case"].iloc[0]
        folds = " and ".join(scores.loc[scores["case"] == case, "fold"].drop_duplicates())
        raise UsageError(
            f"a case may be validated once, {case} of {run.folder} is in the folds {folds}: choose folds of one "
            "split by -f."
        )
    return scores


def read_summary(path: Path, dataset: Mapping[str, Any], cure: str) -> Iterator[dict[str, Any]]:
    """Rows of one summary.json: case, structure, Dice, IoU and counts.

    Raises:
        UsageError: the file is cut off, of another tool or of other labels.
    """
    expected = structures(dataset["labels"])
    cases = read_json(path, cure).get("metric_per_case")
    if not isinstance(cases, list) or not cases:
        raise UsageError(f"{path} must hold nnU-Net's metric_per_case, it does not: {cure}.")
    seen = set()
    for record in cases:
        try:
            case = case_name(record["prediction_file"], str(dataset["file_ending"]))
            scores = {tuple(map(int, re.findall(r"\d+", k))): _scores(m) for k, m in record["metrics"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{path} has a case that nnU-Net did not write ({error!r}): {cure}.") from error
        if set(scores) != set(expected):
            there = ", ".join(str(key) for key in sorted(scores))
            raise UsageError(
                f"{path} must have the labels of dataset.json ({', '.join(map(str, expected))}), {case} has {there}: "
                f"{cure}."
            )
        if case in seen:
            raise UsageError(f"{path} must hold every case once, it holds {case} twice: {cure}.")
        seen.add(case)
        for key, name in expected.items():
            for what, value in scores[key].items():
                most = math.inf if what in COUNTS else 1
                if not math.isnan(value) and not (0 <= value <= most and value < math.inf):
                    rule = "be a number of voxels" if what in COUNTS else "lie between 0 and 1"
                    raise UsageError(f"{path}, {case}, {name}: {what} must {rule}, got {value:g}: {cure}.")
            yield {"case": case, "structure": name, **scores[key]}


def _scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Dice, IoU and counts of one structure; NaN for null and for counts that other tools leave out."""
    found = {name: metrics.get(name) for name in COLUMNS[4:]} | {"Dice": metrics["Dice"]}
    scores = {name: math.nan if value is None else float(value) for name, value in found.items()}
    if found["IoU"] is None:
        scores["IoU"] = scores["Dice"] / (2 - scores["Dice"])
    return scores


def case_name(prediction_file: str, file_ending: str) -> str:
    """Name of a case, from the path of its prediction on any operating system.

    Raises:
        ValueError: the file has another ending, or a name that no file has.
    """
    name = re.split(r"[/\\]", prediction_file)[-1]
    if not name.endswith(file_ending):
        raise ValueError(f"{name} does not end in {file_ending}")
    if "\0" in name or len(name.encode("utf-8", "surrogatepass")) > _LONGEST_NAME:
        raise ValueError(f"{name[:40]}... can't be the name of a file")
    return name.removesuffix(file_ending)


def case_means(scores: pd.DataFrame, metric: str = "Dice") -> pd.DataFrame:
    """Mean over the structures of each case, (case, run); a structure without a value does not count."""
    return scores.groupby(["case", "run"], observed=True)[metric].mean().unstack("run")


def by_structure(scores: pd.DataFrame, structure: str, metric: str = "Dice") -> pd.DataFrame:
    """Values of one structure, (case, run)."""
    chosen = scores[scores["structure"] == structure]
    return chosen.pivot(index="case", columns="run", values=metric)


def common_cases(scores: pd.DataFrame) -> list[str]:
    """Names of the cases that every run has, sorted."""
    runs = scores["run"].nunique()
    counts = scores.groupby("case")["run"].nunique()
    return sorted(counts.index[counts == runs])
