"""Where a setting comes from: a preprocessed data set, a plans file, or the size of a patch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.datasets import find_dataset, read_dataset
from nnunet_ext.nnunet.patch_plans import setting_of_patch
from nnunet_ext.nnunet.plans import DEFAULT_PLANS, read_plans
from nnunet_ext.nnunet.setting import Setting

DEFAULT_CONFIGURATION = "3d_fullres"
DEFAULT_CHANNELS, DEFAULT_CLASSES = 1, 3
PREPROCESSED = "nnUNet_preprocessed"

_PLAN = "give files that nnU-Net wrote, or plan the data set again"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the user names; one of `dataset`, `plans_file` and `patch`.

    Args:
        dataset: Number or DatasetXXX_Name of a data set that nnU-Net has planned.
        plans: Name of its plans.
        plans_file: A plans.json; a dataset.json beside it is read too.
        patch: Voxels per axis of an isotropic image.
        configuration: Name in the plans; may be None for a plans file that has 3d_fullres or one configuration.
        channels, classes: Numbers instead of those of dataset.json; classes count the background.
        batch: Patches per training step, instead of those of the plans.
        trusted: Build whatever code the plans name.
    """

    dataset: str | None = None
    plans: str | None = None
    plans_file: Path | None = None
    patch: tuple[int, ...] | None = None
    configuration: str | None = None
    channels: int | None = None
    classes: int | None = None
    batch: int | None = None
    trusted: bool = False

    def setting(self) -> Setting:
        """Read or plan the setting.

        Raises:
            UsageError: options that exclude each other, files that are missing or broken, sizes that can't be.
        """
        self._check()
        if self.patch is not None:
            setting = setting_of_patch(self.patch, self._dataset_json({}))
        elif self.plans_file is not None:
            dataset_file = self.plans_file.parent / "dataset.json"
            found = read_dataset(dataset_file, _PLAN, ()) if os.path.lexists(dataset_file) else {}
            setting = self._read(self.plans_file, found)
        else:
            folder = _dataset_folder(str(self.dataset))
            dataset_json = read_dataset(folder / "dataset.json", _PLAN, ())
            setting = self._read(folder / f"{self.plans or DEFAULT_PLANS}.json", dataset_json)
        return setting if self.batch is None else _with_batch(setting, self.batch)

    def _check(self) -> None:
        given = {"-d": self.dataset, "--plans": self.plans_file, "--patch": self.patch}
        named = [option for option, value in given.items() if value is not None]
        if len(named) != 1:
            raise UsageError(
                f"one of -d, --plans and --patch is needed, got {' and '.join(named) or 'none'}: give one."
            )
        if self.dataset is None and self.plans is not None:
            raise UsageError(f"-p {self.plans} names plans of a data set, got {named[0]}: give -d, or leave -p out.")
        if self.dataset is not None and self.configuration is None:
            raise UsageError("-d needs a configuration, got none: add for example -c 3d_fullres.")
        if self.patch is not None and self.configuration is not None:
            raise UsageError(
                f"--patch is planned as 2d or 3d_fullres by itself, got -c {self.configuration}: leave -c out."
            )
        for option, value in (("channels", self.channels), ("classes", self.classes), ("batch", self.batch)):
            smallest = 2 if option == "classes" else 1
            if value is not None and value < smallest:
                raise UsageError(f"--{option} must be at least {smallest}, got {value}: enlarge it.")

    def _read(self, path: Path, dataset_json: Mapping[str, Any]) -> Setting:
        plans = read_plans(path, _PLAN)
        configurations = plans["configurations"]
        only = next(iter(configurations)) if len(configurations) == 1 else DEFAULT_CONFIGURATION
        setting = Setting(
            plans=plans,
            dataset=self._dataset_json(dataset_json),
            configuration=self.configuration or only,
            trusted=self.trusted,
        )
        try:
            setting.check_code()
            for name in ("patch_size", "batch_size", "strides", "input_channels", "num_classes"):
                getattr(setting, name)
        except UsageError:
            raise
        except Exception as error:
            # Whatever nnU-Net's own code meets in a file that is no plans or no dataset.json.
            raise UsageError(
                f"{path} and its dataset.json must be complete for {setting.configuration}, nnU-Net fails with "
                f"{error!r}: plan the data set again."
            ) from error
        return setting

    def _dataset_json(self, found: Mapping[str, Any]) -> dict[str, Any]:
        content = dict(found)
        if self.channels is not None or not {"channel_names", "modality"} & set(content):
            content.pop("modality", None)
            names = range(self.channels or DEFAULT_CHANNELS)
            content["channel_names"] = {str(i): f"channel {i}" for i in names}
        if self.classes is not None or "labels" not in content:
            content.pop("regions_class_order", None)
            classes = range(1, self.classes or DEFAULT_CLASSES)
            content["labels"] = {"background": 0, **{f"class {i}": i for i in classes}}
        return content


def _dataset_folder(dataset: str) -> Path:
    if not dataset.isdecimal() and not dataset.startswith("Dataset"):
        raise UsageError(f"-d needs a number or DatasetXXX_Name, got {dataset}: correct it.")
    plan = f"run nnUNetv2_plan_and_preprocess -d {dataset} first"
    return find_dataset(dataset, "-d", PREPROCESSED, instead="use --plans", cure=plan)


def _with_batch(setting: Setting, batch: int) -> Setting:
    plans = deepcopy(dict(setting.plans))
    plans["configurations"][setting.configuration]["batch_size"] = batch
    return replace(setting, plans=plans)
