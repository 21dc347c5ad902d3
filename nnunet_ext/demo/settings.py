"""What the user asks for, and where everything of a demo lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnunet_ext.demo import phantom
from nnunet_ext.nnunet.datasets import read_dataset

FULL_SCHEDULE = "full"
PLANS = "nnUNetPlans"
AGAIN = "delete it and call again"  # what to do with a file of the demo that can't be read


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the user asks for.

    Args:
        root: Absolute folder of the demo.
        raw: Absolute folder of a data set in nnU-Net's raw format; None for the phantom.
        trainers: Names without a schedule's suffix.
        schedule: Suffix such as "9epochs_20iters_NoMirroring", or "full" for the trainers' own schedule.
        configuration: "2d", "3d_fullres" or "3d_lowres".
        device: "cpu", "cuda" or "mps"; None for what the folder's demo has used, else what PyTorch finds.
    """

    root: Path
    raw: Path | None
    trainers: tuple[str, ...]
    schedule: str
    configuration: str
    device: str | None = None

    @property
    def variables(self) -> dict[str, Path]:
        """The folders that nnU-Net reads from environment variables."""
        return {name: self.root / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}

    @property
    def dataset(self) -> str:
        """DatasetXXX_Name."""
        return phantom.NAME if self.raw is None else self.raw.name

    @property
    def data(self) -> Path:
        """The demo's own data set in nnU-Net's raw format."""
        return self.root / "nnUNet_raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        """What planning and preprocessing make."""
        return self.root / "nnUNet_preprocessed" / self.dataset

    def scheduled(self, trainer: str) -> str:
        """Name by which nnU-Net is asked for the trainer."""
        return trainer if self.schedule == FULL_SCHEDULE else f"{trainer}_{self.schedule}"

    def model(self, trainer: str) -> Path:
        """Results of a training."""
        name = f"{self.scheduled(trainer)}__{PLANS}__{self.configuration}"
        return self.root / "nnUNet_results" / self.dataset / name

    def predictions(self, trainer: str) -> Path:
        """Predicted segmentations of the unseen scans."""
        return self.root / "predictions" / f"{self.scheduled(trainer)}__{self.configuration}"

    @property
    def file_ending(self) -> str:
        """Ending of the data set's files."""
        return str(read_dataset(self.data / "dataset.json", AGAIN)["file_ending"])

    def cases(self, part: str) -> list[str]:
        """Names of the training ("Tr") or unseen ("Ts") cases."""
        ending = self.file_ending
        return sorted(p.name.removesuffix(ending) for p in (self.data / f"labels{part}").glob(f"*{ending}"))
