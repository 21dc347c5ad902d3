"""Images without labels, preprocessed as nnU-Net does and mixed into the cases that a student is trained on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import create_paths_fn, get_identifiers_from_splitted_dataset_folder

from nnunet_ext.errors import UsageError
from nnunet_ext.files import whole_folder
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.parallel import mapped
from nnunet_ext.printable import first_few, one_line

_PREFIX = "unlabelled:"  # of the keys in a batch
_MOST_REPEATS = 8  # of a case in the list that is drawn from: the precision of the share
_LOCATIONS = 100  # voxels of an image on which patches may be centred, drawn anew for each


def is_unlabelled(key: str) -> bool:
    """Whether the key of a sample is that of an image without labels."""
    return key.startswith(_PREFIX)


def preprocess(images: Path, setting: Setting, folder: Path, cases: Collection[str]) -> Path:
    """Preprocess a folder of images, unless that is done; return the folder with the result.

    The result has a name of its own for these files and this preprocessing: trainings that run keep theirs.

    Args:
        images: Folder with CASE_0000.nii.gz and so on, in the format of the data set.
        setting: Plans, data set and configuration.
        folder: Preprocessed data of the configuration; the result stands beside it.
        cases: Names of the data set's own cases.

    Raises:
        UsageError: there is no image, an image lacks channels, is a case of the data set, or can't be read.
    """
    files = _files(images, setting, cases)
    target = folder.with_name(f"{folder.name}_unlabelled_{_digest(files, setting)}")
    with FileLock(f"{target}.lock"):  # several folds, or GPUs, may begin at once
        if not all((target / f"{case}.pkl").is_file() for case in files):
            with whole_folder(target, replace=True) as part:
                jobs = [(str(part / case), paths) for case, paths in files.items()]
                list(mapped(partial(_preprocess, setting), jobs, default_num_processes))
    return target


def _digest(files: Mapping[str, Sequence[str]], setting: Setting) -> str:
    """Of all that the preprocessed images depend on."""
    stamps = [[file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns] for file in chain(*files.values())]
    configuration = setting.configuration_manager.configuration
    wanted = ("spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name")
    facts = {key: value for key, value in configuration.items() if key in wanted or key.startswith("resampling")}
    facts |= {
        key: setting.plans.get(key) for key in ("transpose_forward", "foreground_intensity_properties_per_channel")
    }
    return hashlib.sha256(json.dumps([stamps, facts], sort_keys=True, default=str).encode()).hexdigest()[:12]


def _files(images: Path, setting: Setting, cases: Collection[str]) -> dict[str, list[str]]:
    ending, channels = setting.dataset["file_ending"], len(setting.dataset["channel_names"])
    if not images.is_dir():
        raise UsageError(f"unlabelled must be an existing folder of images, got {images}: correct the plans.")
    names = [str(name) for name in get_identifiers_from_splitted_dataset_folder(str(images), ending)]
    there = sorted(path.name for path in images.iterdir())
    files = {name: sorted(create_paths_fn(str(images), there, ending, name)) for name in names}
    if not files or any(len(paths) != channels for paths in files.values()):
        wrong = [name for name, paths in files.items() if len(paths) != channels]
        raise UsageError(
            f"{images} must hold images with {channels} channel(s) each, CASE_0000{ending} and so on, as for "
            f"prediction, got {first_few(wrong) or 'none'}: complete it, or correct the plans."
        )
    raw = os.environ.get("nnUNet_raw", "")  # noqa: SIM112
    own = Path(raw, str(setting.plans.get("dataset_name")), "imagesTr").resolve()
    linked = {name for name, paths in files.items() if any(Path(path).resolve().parent == own for path in paths)}
    if known := sorted(set(files) & set(cases) | linked):
        raise UsageError(
            f"images without labels must not be cases of the data set, some of which are held back for tests, got "
            f"{first_few(known)} in {images}: take them out, or give other images other names."
        )
    return files


def _preprocess(setting: Setting, job: tuple[str, list[str]]) -> None:
    target, paths = job
    plans = PlansManager(dict(setting.plans))
    configuration = plans.get_configuration(setting.configuration)
    preprocessor = configuration.preprocessor_class(verbose=False)
    try:
        preprocessor.run_case_save(target, paths, None, plans, configuration, dict(setting.dataset))
    except Exception as error:  # of any reader, for any file
        raise UsageError(f"{paths[0]} can't be preprocessed ({one_line(error)}): repair it, or take it out.") from error


class MixedDataset:
    """Training cases and images without labels, as nnU-Net's loader draws from them.

    Args:
        labelled: nnU-Net's data set of the training cases.
        unlabelled: nnU-Net's data set of the images.
        share: Of the samples that are drawn from the images, as near as a list of repeated names comes.
        all_labels: Labels of the data set without the one to be ignored.

    Attributes:
        identifiers: Names that nnU-Net's loader draws from, each as likely as the others.
    """

    def __init__(self, labelled: Any, unlabelled: Any, share: float, all_labels: Sequence[int]) -> None:
        self._labelled, self._unlabelled, self._anywhere = labelled, unlabelled, (-1, *all_labels)
        images = [f"{_PREFIX}{name}" for name in unlabelled.identifiers]
        ratio = Fraction(share / (1 - share) * len(labelled.identifiers) / len(images))
        if ratio >= 1:
            ratio = ratio.limit_denominator(_MOST_REPEATS)
        else:
            ratio = 1 / (1 / ratio).limit_denominator(_MOST_REPEATS)
        self.identifiers = [*labelled.identifiers * ratio.denominator, *images * ratio.numerator]

    def load_case(self, identifier: str) -> Any:
        """What nnU-Net's data sets give: image, labels, those of the previous stage, properties.

        The foreground of an image without labels is anywhere.
        """
        if not is_unlabelled(identifier):
            return self._labelled.load_case(identifier)
        image, empty, previous, properties = self._unlabelled.load_case(identifier.removeprefix(_PREFIX))
        voxels = np.random.randint(0, empty.shape, (_LOCATIONS, len(empty.shape)))
        return image, empty, previous, {**properties, "class_locations": {self._anywhere: voxels}}
