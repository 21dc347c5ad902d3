"""What to compare, as a user names it: by data set and trainers, by folders, or by predictions and references."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnunet_ext import registry
from nnunet_ext.comparison import cost, gate, places, run_folders
from nnunet_ext.comparison.compare import ComparisonRequest
from nnunet_ext.comparison.run_folders import RES_ENC_M
from nnunet_ext.comparison.scores import read_validation
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.plans import DEFAULT_PLANS


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Names and folders, as the options of `nnunet-ext compare` hold them.

    Args:
        dataset: Number or name; with `configurations`, `plans` and `trainers` names runs below `results`.
        results: Folder of all results; None: what `nnUNet_results` names.
        folds: Folds to compare; None: all that are validated.
        folders: Folders of further runs, TRAINER__PLANS__CONFIGURATION.
        predictions: Folders of segmentations of held-out cases, in the order of the runs.
        references: Folder of the held-out cases' references.
        description: Dataset.json of the labels; None: the runs' own, or one beside the predictions.
        names: Names of the runs, in their order; empty: made of trainers, plans and configurations.
        baseline: Label or trainer; None: the first run.
        margin: Loss of Dice that does not matter, in Dice points (1 point = 0.01); None: no verdicts.
        accepted: Names of checks of `nnunet_ext.comparison.gate` that may fail.
        tolerance: Tolerance of NSD in mm; None: no surface distances.
        validation_references, images: Folders with the cases of runs that come from another machine.
        benchmark: JSON of `nnunet-ext benchmark`; None: benchmark.json in `output`, where there is one.
        output: Folder of the report.
        processes: Number of processes that read segmentations; None: as many as nnU-Net takes.
        trusted: Build whatever code the runs' plans name.
    """

    dataset: str | None = None
    configurations: Sequence[str] = ("3d_fullres",)
    plans: Sequence[str] = (DEFAULT_PLANS,)
    trainers: Sequence[str] = (registry.CORE_TRAINER,)
    results: Path | None = None
    folds: Sequence[str] | None = None
    folders: Sequence[Path] = ()
    predictions: Sequence[Path] = ()
    references: Path | None = None
    description: Path | None = None
    names: Sequence[str] = ()
    baseline: str | None = None
    margin: float | None = None
    accepted: Sequence[str] = ()
    tolerance: float | None = None
    validation_references: Path | None = None
    images: Path | None = None
    benchmark: Path | None = None
    output: Path | None = None
    processes: int | None = None
    trusted: bool = False


def request(selection: Selection) -> ComparisonRequest:
    """Find and read what the selection names.

    Raises:
        UsageError: a name or folder is wrong, or two contradict each other.
    """
    from nnunetv2.configuration import default_num_processes

    _check(selection)
    found = [run_folders.read_run(folder, selection.folds) for folder in _folders(selection)]
    if found:
        _check_deployed(found, selection)
        found = run_folders.labelled(found, selection.names)
        labels = [run.label for run in found]
        predictions = _named(labels, selection.predictions) if selection.predictions else {}
    else:
        labels = [folder.resolve().name for folder in selection.predictions]
        predictions = _named(list(selection.names) or labels, selection.predictions)
    if selection.description is None and found:
        dataset = found[0].dataset
    else:
        beside = [*selection.predictions, *([selection.references] if selection.references else [])]
        dataset = places.dataset_of(beside, selection.description)
    named, found = found, _with_second(found, selection)
    baseline = _baseline(selection.baseline, named, [run.label for run in found] or list(predictions))
    return ComparisonRequest(
        runs=tuple(found),
        predictions=predictions,
        references=selection.references,
        dataset=dataset,
        baseline=baseline,
        second=next((run.label for run in found if run.is_res_enc_m and run.label != baseline), None),
        margin=selection.margin,
        accepted=tuple(selection.accepted),
        tolerance=selection.tolerance,
        places=places.Places(
            raw=_variable("nnUNet_raw"),
            preprocessed=_variable("nnUNet_preprocessed"),
            references=selection.validation_references,
            images=selection.images,
        ),
        benchmark=cost.read_benchmark(selection.benchmark, selection.output),
        processes=selection.processes or int(default_num_processes),
        trusted=selection.trusted,
    )


def _check(selection: Selection) -> None:
    """Refuse options that contradict each other or have values without a meaning."""
    if unknown := [name for name in selection.accepted if name not in gate.NAMES]:
        raise UsageError(f"--accept must be of {', '.join(gate.NAMES)}, got {unknown[0]}: correct it.")
    for name, value in (("--margin", selection.margin), ("--surface", selection.tolerance)):
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"{name} must be 0 or more, got {value:g}: correct it.")
    if selection.processes is not None and selection.processes < 1:
        raise UsageError(f"-np must be 1 or more, got {selection.processes}: correct it.")
    if bool(selection.predictions) != (selection.references is not None):
        raise UsageError("-pred and -ref belong together, got only one of them: add the other.")
    if not (selection.dataset or selection.folders or selection.predictions):
        raise UsageError(
            "what to compare must be given, nothing is: add -d DATASET -tr ..., -m FOLDER ..., or -pred ... -ref ...."
        )
    for folder in (*selection.predictions, *([selection.references] if selection.references else [])):
        if not folder.is_dir():
            raise UsageError(f"-pred and -ref need existing folders, got {folder}: correct it.")
    if selection.output is not None and selection.output.exists() and not selection.output.is_dir():
        raise UsageError(f"-o needs a folder, got the file {selection.output}: choose another.")


def _folders(selection: Selection) -> list[Path]:
    if not selection.dataset:
        return list(selection.folders)
    named = run_folders.find_runs(
        selection.results, selection.dataset, selection.configurations, selection.trainers, selection.plans
    )
    return [*named, *selection.folders]


def _check_deployed(found: Sequence[run_folders.Run], selection: Selection) -> None:
    deployed = [run for run in found if run.deployed]
    if deployed and not selection.predictions:
        raise UsageError(
            f"a deployed model has no validation, got {deployed[0].folder}: predict held-out scans with every model, "
            "and add -pred FOLDER ... -ref REFERENCES."
        )


def _with_second(found: list[run_folders.Run], selection: Selection) -> list[run_folders.Run]:
    """Add nnU-Net's ResEnc M as a second baseline, where it lies beside the runs, with the same schedule and folds."""
    if not selection.dataset or selection.predictions or any(run.is_res_enc_m for run in found):
        return found
    first = found[0]
    trainer = registry.CORE_TRAINER + run_folders.suffix(first.trainer)
    folder = first.folder.with_name(f"{trainer}__{run_folders.RES_ENC_M}__{first.configuration}")
    label = "ResEnc M" if all(run.label != "ResEnc M" for run in found) else RES_ENC_M
    try:
        second = replace(run_folders.read_run(folder, first.folds), label=label)
        own, wanted = read_validation(second), read_validation(first)
    except UsageError:  # not there, or not whole: nobody asked for it
        return found
    keys = [set(zip(scores["case"], scores["structure"], strict=True)) for scores in (wanted, own)]
    ending = str(second.dataset["file_ending"])
    files = (second.fold_folder(row.fold) / "validation" / f"{row.case}{ending}" for row in own.itertuples())
    is_fit = keys[0] <= keys[1] and (selection.tolerance is None or all(path.is_file() for path in files))
    return [*found, second] if is_fit else found


def _variable(name: str) -> Path | None:
    return Path(os.environ[name]) if os.environ.get(name) else None


def _named(labels: Sequence[str], folders: Sequence[Path]) -> dict[str, Path]:
    if len(labels) != len(folders) or len(set(labels)) != len(labels):
        raise UsageError(
            f"-pred needs one folder for each of {', '.join(labels)}, got {' '.join(map(str, folders))}: correct them, "
            "or tell them apart by --names."
        )
    return dict(zip(labels, folders, strict=True))


def _baseline(asked: str | None, found: Sequence[run_folders.Run], labels: Sequence[str]) -> str:
    if asked is None:
        return labels[0]
    matching = [label for label in labels if label == asked]
    matching = matching or [run.label for run in found if asked in (run.trainer, run.folder.name)]
    if len(matching) != 1:
        raise UsageError(f"--baseline needs one of {'; '.join(labels)}, got {asked}: choose one.")
    return matching[0]
