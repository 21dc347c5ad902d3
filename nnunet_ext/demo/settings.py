"""What the user asks for, and the folder of a demo."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_ext import files, registry
from nnunet_ext.errors import UsageError
from nnunet_ext.files import PARTIAL, write_text, writing
from nnunet_ext.nnunet.datasets import number_of, read_dataset

FULL_SCHEDULE = "full"
PLANS = "nnUNetPlans"
LOCK = "demo.lock"
_NOTE = "demo.json"


@dataclass(frozen=True)
class Settings:
    """What the user asks for.

    Args:
        output: Folder of the demo.
        raw: Data set in nnU-Net's raw format; None for the phantom.
        trainers: Names without a schedule's suffix.
        schedule: Suffix such as "9epochs_20iters_NoMirroring", or "full" for the trainers' own schedule.
        configuration: "2d", "3d_fullres" or "3d_lowres".
        device: "cpu", "cuda" or "mps"; None for what the folder's demo has used, else what PyTorch finds.
    """

    output: Path
    raw: Path | None
    trainers: tuple[str, ...]
    schedule: str
    configuration: str
    device: str | None


@dataclass(frozen=True)
class Demo:
    """Where everything of one demo lies.

    Args:
        root: Absolute folder of the demo.
        dataset: DatasetXXX_Name.
        trainers: Names as the user gave them.
        schedule, configuration, device: As in `Settings`.
    """

    root: Path
    dataset: str
    trainers: tuple[str, ...]
    schedule: str
    configuration: str
    device: str

    @property
    def variables(self) -> dict[str, Path]:
        """The folders that nnU-Net reads from environment variables."""
        return {name: self.root / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}

    @property
    def dataset_id(self) -> str:
        """The data set's number, as the commands take it."""
        return str(number_of(self.dataset))

    @property
    def raw(self) -> Path:
        """The data set in nnU-Net's raw format."""
        return self.variables["nnUNet_raw"] / self.dataset

    @property
    def preprocessed(self) -> Path:
        """What planning and preprocessing make."""
        return self.variables["nnUNet_preprocessed"] / self.dataset

    def scheduled(self, trainer: str) -> str:
        """Name by which nnU-Net is asked for the trainer."""
        return trainer if self.schedule == FULL_SCHEDULE else f"{trainer}_{self.schedule}"

    def model(self, trainer: str) -> Path:
        """Results of a training."""
        name = f"{self.scheduled(trainer)}__{PLANS}__{self.configuration}"
        return self.variables["nnUNet_results"] / self.dataset / name

    def predictions(self, trainer: str) -> Path:
        """Predicted segmentations of the unseen scans."""
        return self.root / "predictions" / f"{self.scheduled(trainer)}__{self.configuration}"

    def description(self) -> dict[str, Any]:
        """Content of dataset.json."""
        return read_dataset(self.raw / "dataset.json", "delete it and call again")

    def cases(self, part: str) -> list[str]:
        """Names of the training ("Tr") or unseen ("Ts") cases."""
        ending = str(self.description()["file_ending"])
        return sorted(path.name[: -len(ending)] for path in (self.raw / f"labels{part}").glob(f"*{ending}"))


def check_trainers(settings: Settings) -> None:
    """Refuse a schedule or trainer that nnU-Net would not find.

    Raises:
        UsageError: the name that is wrong, and where right ones are shown.
    """
    full = settings.schedule == FULL_SCHEDULE
    schedule = registry.parse_schedule(f"nnUNetTrainer_{settings.schedule}")
    if not full and (schedule is None or schedule.base != "nnUNetTrainer"):
        raise UsageError(
            f"--schedule needs [<N>epochs][_<M>iters][_NoMirroring] or {FULL_SCHEDULE!r}, "
            f"got {settings.schedule!r}: use for example 9epochs_20iters."
        )
    known = {"nnUNetTrainer", *registry.names("trainers"), *(registry.core_names("trainers") if full else ())}
    unknown = [trainer for trainer in settings.trainers if trainer not in known]
    if unknown:
        raise UsageError(
            "--trainers needs nnUNetTrainer or names that `nnunet-ext list` shows, "
            f"got {unknown[0]!r}: correct it."
        )


def prepare_folder(folder: Path) -> None:
    """Make the demo's folder; refuse one that holds anything else.

    Raises:
        UsageError: it holds other files, or can't be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if name not in (LOCK, _NOTE) and not name.startswith(PARTIAL)]
    if foreign and _NOTE not in names:
        raise UsageError(
            f"--output needs an empty folder or that of a demo, {folder} holds {foreign[0]}: choose another."
        )


def settle(settings: Settings, default_device: Callable[[], str]) -> Settings:
    """Compare with the demo that the folder holds, or note the settings where it holds none yet.

    Trainers may differ: each has folders of its own, so that one can be added to a demo.

    Raises:
        UsageError: the folder holds a demo with other options.
    """
    note = settings.output / _NOTE
    held = read_json(note) if note.is_file() else {}
    settings = replace(settings, device=settings.device or held.get("device") or default_device())
    asked = {key: None if value is None else str(value) for key, value in asdict(settings).items()}
    del asked["output"], asked["trainers"]
    if not held:
        write_text(note, json.dumps(asked, indent=2) + "\n")
        return settings
    changed = {key: value for key, value in asked.items() if held.get(key) != value}
    differing = [f"{key} {held.get(key)}, now {value}" for key, value in changed.items()]
    if differing:
        raise UsageError(
            f"{settings.output} holds a demo with other options ({'; '.join(differing)}): "
            "choose another folder by --output, or delete this one."
        )
    return settings


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that the demo or nnU-Net wrote.

    Raises:
        UsageError: it can't be read.
    """
    return dict(files.read_json(path, "delete it and call again"))
