"""Compares trained models: accuracy with paired statistics, cost, doubts. `report.write` makes the report of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_ext.comparison import checks
from nnunet_ext.comparison.accuracy import Evaluation, evaluate
from nnunet_ext.comparison.cost import Cost, read_cost
from nnunet_ext.comparison.gate import Gate, gate
from nnunet_ext.comparison.places import Places
from nnunet_ext.comparison.run_folders import Run
from nnunet_ext.comparison.scores import read_validation
from nnunet_ext.comparison.segmentation_scores import Job, Progress, score
from nnunet_ext.comparison.training import Training, read_training
from nnunet_ext.errors import UsageError

Status = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ComparisonRequest:
    """What to compare.

    Args:
        runs: Trained models; may be empty where there are predictions.
        predictions: Label -> folder of segmentations of held-out cases; the labels of `runs` where there are runs.
        references: Folder of the held-out cases' references.
        dataset: Content of dataset.json.
        baseline: Label of the run that the others are compared with.
        second: Label of the second baseline; None without one.
        margin: Loss of Dice that does not matter, in Dice points (1 point = 0.01); None: no verdicts.
        accepted: Names of checks of `gate` that may fail.
        tolerance: Tolerance of NSD in mm; None: no surface distances.
        places: Folders of references and images of validation cases.
        benchmark: Content of `nnunet-ext benchmark`'s JSON.
        processes: Number of processes that read segmentations.
        trusted: Build whatever code the runs' plans name.
    """

    runs: tuple[Run, ...]
    predictions: Mapping[str, Path]
    references: Path | None
    dataset: dict[str, Any]
    baseline: str
    second: str | None = None
    margin: float | None = None
    accepted: tuple[str, ...] = ()
    tolerance: float | None = None
    places: Places = field(default_factory=Places)
    benchmark: Mapping[str, Any] | None = None
    processes: int = 1
    trusted: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of what is compared, the baseline first."""
        labels = [run.label for run in self.runs] or list(self.predictions)
        return (self.baseline, *(label for label in labels if label != self.baseline))


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Args:
        request: What was asked for.
        evaluations: Results of cross-validation and of held-out cases, as far as there are any.
        trainings, costs: Label -> what its run logged and costs.
        gate: What the comparison rests on, and what may be said.
        warnings: Why the comparison may not be fair.
    """

    request: ComparisonRequest
    evaluations: tuple[Evaluation, ...]
    trainings: Mapping[str, Training]
    costs: Mapping[str, Cost]
    gate: Gate
    warnings: tuple[str, ...]


def compare(request: ComparisonRequest, on_status: Status = lambda _: None) -> Comparison:
    """Read all results and compare them.

    Raises:
        UsageError: a file is missing, cut off or foreign, or there is nothing to compare.
    """
    runs = sorted(request.runs, key=lambda run: request.labels.index(run.label))
    request = replace(request, runs=tuple(runs))
    warnings: list[str] = []
    evaluations = []
    if runs and not any(run.deployed for run in runs):
        on_status("reading validation results")
        scores, found = _validation(request, on_status)
        warnings += found
        evaluations.append(evaluate("cross-validation", scores, request.labels, request.second))
    if request.predictions:
        on_status("evaluating predictions")
        scores, found = _held_out(request, on_status)
        warnings += found
        evaluations.append(evaluate("held-out", scores, request.labels, request.second))
    on_status("reading trainings")
    trainings = {run.label: read_training(run) for run in runs}
    costs = {}
    for run in runs:
        on_status(f"measuring the network of {run.label}")
        costs[run.label], found = read_cost(run, trainings[run.label], request.benchmark, request.trusted)
        warnings += [*trainings[run.label].warnings, *found]
    settings = checks.of_settings(runs, trainings) if runs else []
    passed = gate(runs, trainings, evaluations, margin=request.margin, accepted=request.accepted)
    return Comparison(request, tuple(evaluations), trainings, costs, passed, (*settings, *warnings))


def _validation(request: ComparisonRequest, on_status: Status) -> tuple[pd.DataFrame, list[str]]:
    tables, warnings = [], []
    for run in request.runs:
        own = read_validation(run)
        warnings += checks.of_files(run, own, request.places)
        if request.tolerance is not None:
            own = _with_surface(run, own, request, _counter(on_status, f"surfaces of {run.label}"))
        tables.append(own)
    scores = _shared_structures(pd.concat(tables, ignore_index=True), warnings)
    return scores, [*warnings, *checks.of_scores(scores)]


def _with_surface(run: Run, scores: pd.DataFrame, request: ComparisonRequest, on_progress: Progress) -> pd.DataFrame:
    """Add NSD and HD95 of the segmentations that lie beside the summaries."""
    ending, name = str(run.dataset["file_ending"]), str(run.plans.get("dataset_name"))
    jobs = []
    for fold, case in scores[["fold", "case"]].drop_duplicates().itertuples(index=False):
        prediction = run.fold_folder(fold) / "validation" / f"{case}{ending}"
        reference = request.places.reference(name, case, ending)
        if reference is None or not prediction.is_file():
            missing = prediction if reference else f"the reference of {case}"
            raise UsageError(
                f"--surface needs every segmentation and its reference, {missing} is missing: copy it, name the "
                "references' folder by --references, or leave out --surface."
            )
        jobs.append(
            Job(case=case, prediction=prediction, reference=reference, dataset=run.dataset, tolerance=request.tolerance)
        )
    found = pd.DataFrame(score(jobs, request.processes, on_progress))
    return scores.merge(found[["case", "structure", "NSD", "HD95"]], on=["case", "structure"], how="left")


def _held_out(request: ComparisonRequest, on_status: Status) -> tuple[pd.DataFrame, list[str]]:
    if request.references is None or not request.references.is_dir():
        raise UsageError(f"-ref needs the folder of the references, got {request.references}: correct it.")
    ending = str(request.dataset["file_ending"])
    referenced = _cases(request.references, ending)
    tables, warnings = [], []
    for label, folder in request.predictions.items():
        predicted = _cases(folder, ending)
        warnings += checks.of_predictions(label, predicted, referenced, folder)
        jobs = [
            Job(
                case=case,
                prediction=folder / f"{case}{ending}",
                reference=request.references / f"{case}{ending}",
                dataset=request.dataset,
                tolerance=request.tolerance,
            )
            for case in sorted(predicted & referenced)
        ]
        if not jobs:
            raise UsageError(
                f"-pred needs segmentations *{ending} of the cases in {request.references}, {folder} has none: correct "
                "the path."
            )
        rows = score(jobs, request.processes, _counter(on_status, f"evaluating {label}"))
        tables.append(pd.DataFrame([{"run": label, "fold": "", **row} for row in rows]))
    scores = pd.concat(tables, ignore_index=True)
    return scores, [*warnings, *checks.of_scores(scores)]


def _cases(folder: Path, ending: str) -> set[str]:
    return {path.name.removesuffix(ending) for path in folder.glob(f"*{ending}") if path.is_file()}


def _counter(on_status: Status, text: str) -> Progress:
    return lambda done, total: on_status(f"{text} {done}/{total}")


def _shared_structures(scores: pd.DataFrame, warnings: list[str]) -> pd.DataFrame:
    """Keep the structures that all runs have; the names of the others become a warning.

    Raises:
        UsageError: there is none.
    """
    names = {str(label): list(dict.fromkeys(own["structure"])) for label, own in scores.groupby("run", sort=False)}
    shared = [name for name in next(iter(names.values())) if all(name in own for own in names.values())]
    if not shared:
        described = "; ".join(f"{label}: {', '.join(own)}" for label, own in names.items())
        raise UsageError(f"the runs must have structures in common, they have none ({described}): compare others.")
    for label, own in names.items():
        if other := [name for name in own if name not in shared]:
            warnings.append(f"{label}: {', '.join(other)} is not compared, because another run does not have it.")
    return scores[scores["structure"].isin(shared)].reset_index(drop=True)
