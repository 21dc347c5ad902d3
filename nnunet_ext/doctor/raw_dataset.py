"""Checks a data set in nnU-Net's raw format before days of training: all that is wrong, each with its cure.

It goes further than nnU-Net's --verify_dataset_integrity, which stops at the first kind of fault and reads files that
were cut off as their readers do.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_ext.doctor.case import Case, Look, Rules, look
from nnunet_ext.doctor.description import describe, label_manager
from nnunet_ext.doctor.environment import FOLDERS
from nnunet_ext.doctor.files import of_folder
from nnunet_ext.doctor.finding import Finding, failure, ok, warning
from nnunet_ext.nnunet.datasets import dataset_folders, find_dataset, number_of
from nnunet_ext.parallel import mapped
from nnunet_ext.printable import counted
from nnunet_ext.whole import is_whole

RAW = "nnUNet_raw"
SUBJECT = "data set"
FOLDS = 5  # that nnU-Net makes
_FEW = 12  # cases that are read before other processes would have started
Progress = Callable[[int, int], None]


def default_processes() -> int:
    """As many as nnU-Net's own commands start, but not more than there are cores."""
    from nnunetv2.configuration import default_num_processes

    return max(1, min(int(default_num_processes), os.cpu_count() or 1))


def find(dataset: str) -> Path:
    """Folder of a data set: by its number or name below nnUNet_raw, as nnU-Net's commands take it, or by its path.

    Raises:
        UsageError: there is none, or more than one.
    """
    path = Path(dataset)
    if path.is_dir() and (os.sep in dataset or (path / "dataset.json").is_file()):
        return Path(os.path.abspath(path))
    return find_dataset(dataset, "--dataset", RAW, instead="give a path", cure="give its number, full name or path")


def examine(folder: Path, processes: int, on_progress: Progress) -> list[Finding]:
    """All findings about a data set.

    Args:
        folder: DatasetXXX_Name.
        processes: Number of processes that read.
        on_progress: Called with the number of cases that are done, and of all.
    """
    description, findings = describe(folder / "dataset.json")
    findings += _about_name(folder)
    if description is None:
        return findings
    cases, found = list_cases(folder, description)
    findings += found
    findings += _about_number(folder, description, cases)
    return findings + (about_cases(description, cases, processes, on_progress) if cases else [])


def list_cases(folder: Path, description: Mapping[str, Any]) -> tuple[list[Case], list[Finding]]:
    """Training cases as nnU-Net lists them, without what only looks like one; what is wrong with names of files."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    ending = str(description["file_ending"])
    parts = () if "dataset" in description else ("imagesTr", "labelsTr")  # else it says itself where files lie
    if gone := [part for part in parts if not (folder / part).is_dir()]:
        return [], [failure(SUBJECT, f"has no folder {part}", f"make {folder / part}") for part in gone]
    findings: list[Finding] = []
    try:
        for part in parts:
            findings += of_folder(folder / part, ending, has_channels=part == "imagesTr")
        listed = get_filenames_of_train_images_and_targets(str(folder), deepcopy(dict(description)))
    except OSError as error:  # links in a circle, folders that may not be read
        findings.append(failure(SUBJECT, f"can't be listed: {error}", "restore it, or make it readable"))
        return [], findings
    cases = [
        Case(str(name), tuple(map(Path, files["images"])), Path(files["label"]))
        for name, files in listed.items()
        if files["images"] and not str(name).startswith(".")
    ]
    if not cases:
        where = f"image CASE_0000{ending} in imagesTr" if parts else "case under 'dataset' in dataset.json"
        findings.append(failure(SUBJECT, f"has no {where}", "add or rename the images"))
    elif parts:
        unused = {path.name for path in (folder / "labelsTr").glob(f"*{ending}") if path.name[0] != "."}
        unused -= {case.label.name for case in cases if case.label}
        findings += [
            warning("labelsTr", f"{name} belongs to no image", "add its images, or remove it")
            for name in sorted(unused)
        ]
    return cases, findings


def rules(description: Mapping[str, Any], example: Path | None) -> Rules:
    """What holds for all cases; which reader fits may depend on an example, as for .tif."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    manager = label_manager(description)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            reader = determine_reader_writer_from_dataset_json(description, example and str(example), verbose=False)
        except RuntimeError:  # no reader takes the example, which its case says
            reader = determine_reader_writer_from_dataset_json(description, verbose=False)
    channels = len(description.get("channel_names") or description["modality"])
    return Rules(reader, channels, tuple(manager.foreground_labels), manager.ignore_label)


def about_cases(
    description: Mapping[str, Any], cases: Sequence[Case], processes: int, on_progress: Progress
) -> list[Finding]:
    """Read and check all files of the cases.

    Raises:
        UsageError: memory does not suffice.
    """
    example = next((path for case in cases for path in case.images if is_whole(path)), None)
    common = rules(description, example)
    looks: list[Look] = []
    jobs = [(case, common) for case in cases]
    for seen in mapped(look, jobs, processes if len(jobs) > _FEW else 1):
        looks.append(seen)
        on_progress(len(looks), len(jobs))
    findings = [found for seen in looks for found in seen.findings]
    return [*findings, *_about_all(looks, common), ok(SUBJECT, f"{counted(len(looks), 'case')} read")]


def _about_name(folder: Path) -> Iterator[Finding]:
    number = number_of(folder.name)
    if number is None:
        yield failure(
            SUBJECT, f"is called {folder.name}, nnU-Net needs DatasetXXX_Name (XXX: digits)", "rename the folder"
        )
        return
    roots = [Path(os.environ[name]) for name in FOLDERS if os.environ.get(name)]
    names = {path.name for root in roots for path in dataset_folders(root, str(number))}
    if len(names | {folder.name}) > 1:
        yield failure(
            SUBJECT,
            f"the number {number} means {' and '.join(sorted(names | {folder.name}))} in nnU-Net's three folders",
            "rename or remove the others: nnU-Net's commands take the number",
        )


def _about_number(folder: Path, description: Mapping[str, Any], cases: Sequence[Case]) -> Iterator[Finding]:
    wanted = description.get("numTraining", len(cases))
    if wanted != len(cases):
        yield failure(
            "dataset.json",
            f"numTraining is {wanted!r}, the data set has {counted(len(cases), 'case')}",
            f"set it to {len(cases)}, or add what is missing",
        )
    if 0 < len(cases) < FOLDS and not (folder / "splits_final.json").is_file():
        yield warning(
            SUBJECT,
            f"has {counted(len(cases), 'case')}, nnU-Net makes {counted(FOLDS, 'fold')}",
            "add cases, write a splits_final.json, or train fold 'all'",
        )
    names: dict[str, str] = {}
    for case in cases:
        other = names.setdefault(case.name.lower(), case.name)
        if other != case.name:
            yield failure(case.name, f"differs from {other} in case only", "rename one: some disks take them for one")


def _about_all(looks: Sequence[Look], common: Rules) -> Iterator[Finding]:
    """What only all cases together show."""
    images: dict[str, str] = {}
    for seen in looks:
        other = images.setdefault(seen.digest, seen.name) if seen.digest else seen.name
        if other != seen.name:
            yield warning(
                seen.name,
                f"has the same image as {other}",
                "remove one: in training and validation at once it makes results look better than they are",
            )
    found = frozenset().union(*(seen.labels for seen in looks))
    if not found & {*common.foreground}:
        yield failure(SUBJECT, "no case holds any foreground", "see whether labelsTr holds the right files")
    elif missing := sorted({*common.foreground} - found):
        yield warning(
            SUBJECT,
            f"no case holds label {', '.join(map(str, missing))}",
            "remove it from labels, or add cases that show it",
        )
    yield from _about_axes([seen for seen in looks if seen.shape])


def _about_axes(looks: Sequence[Look]) -> Iterator[Finding]:
    """Axes of one voxel; 2D images have one, that of the largest spacing, by nnU-Net's convention."""
    if not looks:
        return
    shape = np.median([seen.shape for seen in looks], axis=0).tolist()
    spacing = np.median([seen.spacing for seen in looks], axis=0).tolist()
    flat = [axis for axis in range(3) if shape[axis] == 1]
    if flat and flat != [int(np.argmax(spacing))]:
        yield failure(
            SUBJECT,
            f"images have one voxel along axis {' and '.join(map(str, flat))} of {_row(shape)}, whose spacing is not "
            f"the largest ({_row(spacing)}): nnU-Net would plan 3D, which it can't train",
            "store them as 2D images, make this spacing the largest in images and labels, or plan with a planner of "
            "nnunet-ext, which puts this axis first",
        )
    for seen in looks:
        odd = [axis for axis in range(3) if seen.shape[axis] == 1 and axis not in flat]
        if odd:
            yield warning(
                seen.name,
                f"has one voxel along axis {odd[0]}, shape {_row(seen.shape)}; the others have more",
                "see whether its export was cut short",
            )


def _row(numbers: Sequence[float]) -> str:
    return "x".join(f"{n:g}" for n in numbers)
