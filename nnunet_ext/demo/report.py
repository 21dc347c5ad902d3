"""The report of a demo: `nnunet-ext compare` on its models, their validation cases and the unseen scans."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnunet_ext.comparison import compare, run_folders
from nnunet_ext.comparison import report as comparison_report
from nnunet_ext.comparison.places import Places
from nnunet_ext.demo.settings import Demo, read_json

FOLD = "0"
_CAUTION = (
    "This shows that the tool chain works from raw data to evaluation. A short training on few scans says nothing "
    "about the quality that a method reaches on patients."
)


@dataclass(frozen=True)
class Model:
    """What one training gave.

    Args:
        trainer: Name as tables call it.
        dice: Mean Dice of the unseen scans; None where it is not defined.
        seconds_per_epoch: Median over the epochs; None where it was not logged.
    """

    trainer: str
    dice: float | None
    seconds_per_epoch: float | None


@dataclass(frozen=True)
class Report:
    """A written report.

    Args:
        path: File of the page.
        models: One per trainer.
    """

    path: Path
    models: tuple[Model, ...]


def path(demo: Demo) -> Path:
    """Where the report lies."""
    return demo.root / "report.html"


def read(demo: Demo) -> Report:
    """Read a report that `writer` has written."""
    content = read_json(path(demo).with_suffix(".json"))
    unseen = content["evaluations"][-1]
    dice = {
        mean["run"]: mean["mean"]
        for mean in unseen["means"]
        if mean["metric"] == "Dice" and mean["structure"] == unseen["mean_of_structures"]
    }
    models = (
        Model(run["label"], dice[run["label"]], run["cost"]["seconds_per_epoch"]) for run in content["runs"]
    )
    return Report(path(demo), tuple(models))


def writer(demo: Demo, commands: Sequence[tuple[str, ...]]) -> Callable[[Callable[[str], None]], None]:
    """Return a function that writes the report; it gets a callback for a short status."""

    def write(status: Callable[[str], None]) -> None:
        found = compare.compare(request(demo), status)
        found = replace(found, warnings=(_CAUTION, *found.warnings))
        lines = [f"export {name}={shlex.quote(str(folder))}" for name, folder in demo.variables.items()]
        lines += [shlex.join(command) for command in (*commands, compare_command(demo))]
        comparison_report.write(found, demo.root, "\n".join(lines), status)

    return write


def request(demo: Demo) -> compare.ComparisonRequest:
    """What the report compares."""
    found = run_folders.labelled(
        [run_folders.read_run(demo.model(trainer), [FOLD]) for trainer in demo.trainers]
    )
    folders = [demo.predictions(trainer) for trainer in demo.trainers]
    return compare.ComparisonRequest(
        runs=tuple(found),
        predictions={run.label: folder for run, folder in zip(found, folders, strict=True)},
        references=demo.raw / "labelsTs",
        dataset=demo.description(),
        baseline=found[0].label,
        places=Places(demo.variables["nnUNet_raw"], demo.variables["nnUNet_preprocessed"]),
    )


def compare_command(demo: Demo) -> tuple[str, ...]:
    """The same comparison as a command."""
    models = [str(demo.model(trainer)) for trainer in demo.trainers]
    predictions = [str(demo.predictions(trainer)) for trainer in demo.trainers]
    held_out = ("-pred", *predictions, "-ref", str(demo.raw / "labelsTs"))
    return ("nnunet-ext", "compare", "-m", *models, "-f", FOLD, *held_out, "-o", str(demo.root))
