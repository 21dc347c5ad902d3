"""The report of a demo: Dice, times, commands and figures, as Markdown for people and JSON for programs."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median
from typing import Any

from nnunet_ext.demo import figures
from nnunet_ext.demo.figures import Curves, Scan
from nnunet_ext.demo.settings import FULL_SCHEDULE, Demo, read_json
from nnunet_ext.files import write_bytes, write_text

_WINDOW = "Window -160 to 240 HU."


@dataclass(frozen=True)
class Model:
    """What one training gave.

    Args:
        trainer: name as nnU-Net was asked for it.
        dice: structure -> mean Dice of the unseen scans; None where neither truth nor prediction holds it.
        mean_dice: of `dice`; None without any.
        validation_dice: the same of the validation scans of fold 0.
        seconds_per_epoch: median over the epochs.
        epochs: number of epochs.
    """

    trainer: str
    dice: dict[str, float | None]
    mean_dice: float | None
    validation_dice: float | None
    seconds_per_epoch: float
    epochs: int


@dataclass(frozen=True)
class Report:
    """A written report.

    Args:
        path: of the Markdown file.
        models: one per trainer.
    """

    path: Path
    models: tuple[Model, ...]


def path(demo: Demo) -> Path:
    """Where the report lies."""
    return demo.root / "report.md"


def read(demo: Demo) -> Report:
    """Read a report that `writer` has written."""
    models = read_json(path(demo).with_suffix(".json"))["models"]
    return Report(path(demo), tuple(Model(**model) for model in models))


def writer(demo: Demo, commands: Sequence[tuple[str, ...]]) -> Callable[[Callable[[str], None]], None]:
    """Return a function that writes the report; it gets a callback for a short status."""

    def write(status: Callable[[str], None]) -> None:
        status("reading results")
        curves = {trainer: read_curves(demo.model(trainer)) for trainer in demo.trainers}
        models = [_model(demo, trainer, curves[trainer]) for trainer in demo.trainers]
        pictures = {"learning_curves": figures.learning_curves(curves)}
        for case in demo.cases("Ts"):
            status(f"drawing {case}")
            pictures[case] = figures.overlay(_scan(demo, case))
        for name, picture in pictures.items():
            write_bytes(demo.root / "figures" / f"{name}.png", picture)
        lines = [shlex.join(command) for command in commands]
        numbers = {"models": [asdict(model) for model in models], "commands": lines}
        write_text(path(demo).with_suffix(".json"), json.dumps(numbers, indent=2) + "\n")
        write_text(path(demo), markdown(demo, models, commands, _surroundings(demo)))

    return write


def read_curves(model: Path) -> Curves:
    """Read what a training logged from its last checkpoint."""
    import torch

    path = model / "fold_0" / "checkpoint_final.pth"
    log = torch.load(path, map_location="cpu", weights_only=False, mmap=True)["logging"]
    times = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
    return Curves(
        tuple(map(float, log["train_losses"])),
        tuple(map(float, log["val_losses"])),
        tuple(map(float, log["mean_fg_dice"])),
        tuple(float(end - start) for start, end in times),
    )


def label_names(labels: Mapping[str, Any]) -> dict[str, str]:
    """Names of labels and regions, by the keys that nnU-Net's summary.json has for them ("1", "(1, 2)")."""
    return {_key(value): name for name, value in labels.items()}


def _key(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return str(tuple(int(v) for v in value)) if len(value) > 1 else str(int(value[0]))
    return str(int(value))


def _model(demo: Demo, trainer: str, curves: Curves) -> Model:
    names = label_names(demo.description()["labels"])
    unseen = _dice(read_json(demo.predictions(trainer) / "summary.json")["mean"])
    validation = _dice(read_json(demo.model(trainer) / "fold_0" / "validation" / "summary.json")["mean"])
    return Model(
        trainer=demo.scheduled(trainer),
        dice={names.get(key, key): value for key, value in unseen.items()},
        mean_dice=_mean(unseen),
        validation_dice=_mean(validation),
        seconds_per_epoch=median(curves.seconds),
        epochs=len(curves.seconds),
    )


def _dice(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """Dice of every structure; None for nnU-Net's NaN, a structure in neither truth nor prediction."""
    values = {key: float(value["Dice"]) for key, value in metrics.items()}
    return {key: None if math.isnan(value) else value for key, value in values.items()}


def _mean(dice: Mapping[str, float | None]) -> float | None:
    values = [value for value in dice.values() if value is not None]
    return fmean(values) if values else None


def _scan(demo: Demo, case: str) -> Scan:
    """Read an unseen scan and its segmentations with nnU-Net's own reader."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    description = demo.description()
    ending = description["file_ending"]
    image_path = demo.raw / "imagesTs" / f"{case}_0000{ending}"
    reader = determine_reader_writer_from_dataset_json(description, str(image_path), verbose=False)()
    images, properties = reader.read_images((str(image_path),))
    z, y, x = (float(step) for step in properties["spacing"])
    predictions = {}
    for trainer in demo.trainers:
        folder = demo.predictions(trainer)
        labels, _ = reader.read_seg(str(folder / f"{case}{ending}"))
        predictions[f"{trainer}\nDice {number(_case_dice(folder, case), 2)}"] = labels[0]
    truth, _ = reader.read_seg(str(demo.raw / "labelsTs" / f"{case}{ending}"))
    names = {v: name for name, v in description["labels"].items() if isinstance(v, int)}
    return Scan(case, images[0], (z, y, x), truth[0], predictions, names, is_ct(demo))


def is_ct(demo: Demo) -> bool:
    """Tell whether the first channel holds Hounsfield units."""
    return str(next(iter(demo.description()["channel_names"].values()))).lower() == "ct"


def _case_dice(folder: Path, case: str) -> float | None:
    """Mean Dice over the structures of one case."""
    for record in read_json(folder / "summary.json")["metric_per_case"]:
        if Path(record["prediction_file"]).name.startswith(f"{case}."):
            return _mean(_dice(record["metrics"]))
    return None


def _surroundings(demo: Demo) -> str:
    """Versions and machine, in one sentence."""
    import torch

    packages = ("nnunet-ext", "nnunetv2", "torch")
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    versions += f", Python {platform.python_version()}, {platform.system()}"
    device = torch.cuda.get_device_name(0) if demo.device == "cuda" else demo.device
    return f"{versions}, {device}, {os.cpu_count()} CPU cores"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def markdown(
    demo: Demo, models: Sequence[Model], commands: Sequence[tuple[str, ...]], surroundings: str
) -> str:
    """The report's text."""
    description = demo.description()
    training, unseen = demo.cases("Tr"), demo.cases("Ts")
    about = description.get("description") or description.get("name") or demo.dataset
    full = demo.schedule == FULL_SCHEDULE
    schedule = "the trainers' own schedule" if full else f"schedule `{demo.schedule}`"
    lines = [
        f"# {demo.dataset}: trainers of nnU-Net side by side",
        "",
        f"{about}. {len(training)} cases for training (fold 0 holds a fifth of them back for validation), "
        f"{len(unseen)} unseen scans.",
        "",
        f"Configuration `{demo.configuration}`, {schedule}, device `{demo.device}`.",
        "",
        f"Run with {surroundings}.",
        "",
        "This shows that the tool chain works from raw data to evaluation. A short training on few scans "
        "says nothing about the quality that a method reaches on patients.",
        "",
        "## Dice on the unseen scans",
        "",
        *_dice_table(models),
        "",
        "## Training",
        "",
        *_training_table(models),
        "",
        "![Learning curves](figures/learning_curves.png)",
        "",
        "Loss and Dice of nnU-Net's random patches, as it logs them during training.",
        "",
        "## Segmentations of the unseen scans",
        "",
    ]
    for case in unseen:
        lines += [f"![{case}](figures/{case}.png)", ""]
        lines += [f"`{case}`, in slices through its smallest structure. {_WINDOW if is_ct(demo) else ''}", ""]
    lines += ["## Commands", "", "```bash"]
    lines += [f"export {name}={shlex.quote(str(folder))}" for name, folder in demo.variables.items()]
    lines += [*(shlex.join(command) for command in commands), "```", ""]
    return "\n".join(lines)


def _dice_table(models: Sequence[Model]) -> list[str]:
    structures = list(dict.fromkeys(name for model in models for name in model.dice))
    rows = [[name, *(number(model.dice.get(name)) for model in models)] for name in structures]
    rows.append(["**mean**", *(f"**{number(model.mean_dice)}**" for model in models)])
    return _table(["structure", *(f"`{model.trainer}`" for model in models)], rows)


def _training_table(models: Sequence[Model]) -> list[str]:
    rows = [
        [
            f"`{model.trainer}`",
            str(model.epochs),
            f"{model.seconds_per_epoch:.1f}",
            number(model.validation_dice),
        ]
        for model in models
    ]
    return _table(["trainer", "epochs", "seconds per epoch", "Dice of the validation scans"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [list(header), ["---", *("---:" for _ in header[1:])], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def number(value: float | None, digits: int = 3) -> str:
    """Text of a Dice, "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"
