"""The report of a demo: `nnunet-ext compare` on its models, their validation cases and the unseen scans."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from nnunet_ext.comparison import compare, tables
from nnunet_ext.comparison import report as comparison_report
from nnunet_ext.comparison.places import Places
from nnunet_ext.comparison.selection import Selection, request
from nnunet_ext.demo.settings import AGAIN, Demo
from nnunet_ext.files import read_json
from nnunet_ext.whole import is_whole

_CAUTION = (
    "This shows that the tool chain works from raw data to evaluation. A short training on few scans says nothing "
    "about the quality that a method reaches on patients."
)


def path(demo: Demo) -> Path:
    """Where the report lies."""
    return demo.root / "report.html"


def is_of(demo: Demo) -> bool:
    """Whether the report is there and about these trainers."""
    numbers = path(demo).with_suffix(".json")
    if not path(demo).is_file() or not is_whole(numbers):
        return False
    trainers = [run["trainer"] for run in read_json(numbers, AGAIN)["runs"]]
    return trainers == list(map(demo.scheduled, demo.trainers))


def summary(demo: Demo) -> list[str]:
    """One line for each model of the report: mean Dice of the unseen scans, median seconds per epoch."""
    content = read_json(path(demo).with_suffix(".json"), AGAIN)
    unseen, lines = content["evaluations"][-1], []
    dice = {(mean["run"], mean["metric"], mean["structure"]): mean["mean"] for mean in unseen["means"]}
    for run in content["runs"]:
        mean = tables.number(dice[run["label"], "Dice", unseen["mean_of_structures"]])
        lines.append(f"{run['label']}: Dice {mean}, {tables.number(run['cost']['seconds_per_epoch'], 1)} s per epoch")
    return lines


def write(demo: Demo, commands: Sequence[Sequence[str]], on_status: Callable[[str], None]) -> None:
    """Compare and write the report, which holds the commands that were run."""
    models, predictions = list(map(demo.model, demo.trainers)), list(map(demo.predictions, demo.trainers))
    unseen = Selection(
        folders=models, folds=["0"], predictions=predictions, references=demo.data / "labelsTs", processes=1
    )
    places = Places(raw=demo.variables["nnUNet_raw"], preprocessed=demo.variables["nnUNet_preprocessed"])
    found = compare.compare(replace(request(unseen), places=places), on_status)
    words = ["nnunet-ext", "compare", "-m", *models, "-f", "0", "-pred", *predictions]
    words += ["-ref", demo.data / "labelsTs", "-o", demo.root]
    lines = [f"export {name}={shlex.quote(str(folder))}" for name, folder in demo.variables.items()]
    lines += [shlex.join(map(str, command)) for command in (*commands, words)]
    found = replace(found, warnings=(_CAUTION, *found.warnings))
    comparison_report.write(found, demo.root, "\n".join(lines), on_status)
