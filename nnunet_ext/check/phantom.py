"""Tiny preprocessed data sets in a temporary folder: what `nnUNetv2_train` finds after planning."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_ext.aims import DEFAULT
from nnunet_ext.files import whole_folder
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT
from nnunet_ext.nnunet.patch_plans import narrow, setting_of_patch
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.teacher import VARIABLE

FEATURES = (4, 8, 8)
BATCH_SIZE = 2
PLANS = "nnUNetPlans"
TEACHER = "untrained_teacher"  # folder of a model below nnUNet_results/DATASET
_IGNORE = 3  # label of every third column


@dataclass(frozen=True, kw_only=True)
class DataKind:
    """One kind of data set.

    Args:
        title: What is particular about it.
        patch: Voxels per axis.
        spacing: Spacing per axis.
        channels: Channels of the image.
        regions: Whether labels overlap.
        ignore: Whether some voxels have the ignore label.
    """

    title: str
    patch: tuple[int, ...] = (16, 16, 16)
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    channels: int = 1
    regions: bool = False
    ignore: bool = False

    @property
    def dataset(self) -> dict[str, Any]:
        """Content of dataset.json."""
        labels: dict[str, Any] = {"shell": 1, "core": 2}
        if self.regions:
            labels = {"whole": [1, 2], "core": [2]}
        return {
            "channel_names": {str(i): f"channel {i}" for i in range(self.channels)},
            "labels": {"background": 0, **labels, **({"ignore": _IGNORE} if self.ignore else {})},
            **({"regions_class_order": [1, 2]} if self.regions else {}),
            "numTraining": 2,
            "file_ending": ".nii.gz",
        }

    @property
    def setting(self) -> Setting:
        """Plans of this data set, for a narrow network of three stages."""
        return narrow(setting_of_patch(self.patch, self.dataset, self.spacing), FEATURES)


CASES = (
    DataKind(title="3d"),
    DataKind(title="2d", patch=(16, 16), spacing=(1.0, 1.0)),
    DataKind(title="anisotropic", patch=(8, 16, 16), spacing=(3.0, 1.0, 1.0)),
    DataKind(title="three channels", channels=3),
    DataKind(title="regions", regions=True),
    DataKind(title="ignore label", ignore=True),
    DataKind(title="regions and ignore label", regions=True, ignore=True),
)


@contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder as nnU-Net's three folders; before nnU-Net 2.8 entered before nnU-Net is imported."""
    folder = Path(tempfile.mkdtemp(prefix="nnunet_ext-check-"))
    own = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    own |= {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "false", VARIABLE: TEACHER}
    before = {name: os.environ.get(name) for name in own}
    try:
        os.environ.update(own)
        yield folder
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)


def write(case: DataKind) -> str:
    """Write what `nnUNetv2_train` reads, one case to train on and one to validate; return the data set's name.

    Raises:
        UsageError: it can't be written.
    """
    from nnunetv2.paths import nnUNet_preprocessed

    name, setting = f"Dataset900_{case.title.replace(' ', '_')}", case.setting
    plans = deepcopy(dict(setting.plans)) | {"dataset_name": name, "plans_name": PLANS}
    plans["configurations"][setting.configuration] |= {"data_identifier": "data", "batch_size": BATCH_SIZE}
    contents = {
        "dataset": case.dataset,
        "dataset_fingerprint": {},
        PLANS: plans,
        "splits_final": [{"train": ["first"], "val": ["second"]}],
    }
    with whole_folder(Path(str(nnUNet_preprocessed), name), replace=True) as folder:
        (folder / "data").mkdir()
        for file, content in contents.items():
            (folder / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
        for seed, sample in enumerate(("first", "second")):
            _write_case(folder / "data" / sample, case, setting.label_manager, np.random.default_rng(seed))
    return name


def write_teacher(dataset: str, configuration: str, folds: Sequence[int]) -> None:
    """Write what nnU-Net's own trainer leaves, but untrained: a teacher for trainers that need one.

    Args:
        dataset: Name of a data set that is planned and preprocessed.
        configuration: Name in its plans.
        folds: Folds to write.
    """
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    for fold in folds:
        trainer = get_trainer_from_args(dataset, configuration, fold, DEFAULT, PLANS, device=torch.device("cpu"))
        trainer.initialize()
        _, cases = trainer.do_split()
        model = Path(trainer.output_folder_base).with_name(TEACHER)
        validated = model / f"fold_{fold}" / "validation"
        validated.mkdir(parents=True)
        ending = trainer.dataset_json["file_ending"]
        summary = {"metric_per_case": [{"prediction_file": str(validated / f"{case}{ending}")} for case in cases]}
        contents = {
            validated / "summary.json": summary,
            model / "plans.json": trainer.plans_manager.plans,
            model / "dataset.json": trainer.dataset_json,
        }
        for path, content in contents.items():
            path.write_text(json.dumps(content), encoding="utf-8")
        trainer.save_checkpoint(str(validated.with_name(FINAL_CHECKPOINT)))
        shutil.rmtree(trainer.output_folder_base)


def _write_case(path: Path, case: DataKind, labels: Any, random: np.random.Generator) -> None:
    """An image half as long again as the patch along each axis; every patch holds a part of both nested boxes."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    shape = tuple(n + n // 2 for n in case.patch)
    shape = (1, *shape) if len(shape) == 2 else shape
    segmentation: NDArray[np.int8] = np.zeros((1, *shape), dtype=np.int8)
    for label in (1, 2):
        z, y, x = (slice(n * label // 6, n - n * label // 6) for n in shape)
        segmentation[0, z, y, x] = label
    image = segmentation + random.normal(0, 0.5, (case.channels, *shape))
    wanted = [*(labels.foreground_regions if labels.has_regions else labels.foreground_labels)]
    if case.ignore:
        segmentation[..., ::3] = _IGNORE
        wanted.append((-1, *labels.all_labels))
    locations = {key: np.argwhere(np.isin(segmentation, key)) for key in wanted}
    properties = {"spacing": [1.0] * (3 - len(case.spacing)) + [*case.spacing], "class_locations": locations}
    whole = (image.shape, image.shape, segmentation.shape, segmentation.shape)  # chunks and blocks of both
    nnUNetDatasetBlosc2.save_case(image.astype(np.float32), segmentation, properties, str(path), *whole)
