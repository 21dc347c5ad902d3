"""Whether preprocessed data that other plans own are what a configuration needs: same spacing, same normalisation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.datasets import number_of
from nnunet_ext.nnunet.plans import read_plans
from nnunet_ext.printable import counted

# What DefaultPreprocessor reads of a configuration in addition to its spacing.
_READ = (
    "preprocessor_name",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
# Files of a case, as versions of nnU-Net store it; the last one is written last.
_FILES = ((".b2nd", "_seg.b2nd", ".pkl"), (".npz", ".pkl"), (".npy", "_seg.npy", ".pkl"))
_INTENSITIES = "intensities of the data set's fingerprint"


def settled(folder: Path, plans: dict[str, Any], fingerprint: Mapping[str, Any], cases: Sequence[str]) -> Iterator[str]:
    """Give configurations of new plans that can't share data an identifier of their own; say so, and what to run.

    Args:
        folder: Folder of the data set in nnUNet_preprocessed.
        plans: Plans that will be written; changed in place.
        fingerprint: Fingerprint of the data set.
        cases: Names of the training cases, in the fingerprint's order.
    """
    known = len(fingerprint["spacings"]) == len(cases)
    if not known:
        yield (
            f"dataset_fingerprint.json knows {counted(len(fingerprint['spacings']), 'case')}, the data set has "
            f"{len(cases)}: "
            "extract it again, nnUNetv2_plan_and_preprocess with --clean does."
        )
    wanted = []
    for name, configuration in plans["configurations"].items():
        if "data_identifier" not in configuration:
            continue  # inherited
        data, own = configuration["data_identifier"], f"{plans['plans_name']}_{name}"
        found = Preprocessed(folder / data, PlansManager(plans), name)
        reason = found.differing() or (found.wrong(fingerprint, cases) if known else None)
        if reason and data != own:
            configuration["data_identifier"] = own
            yield f"{name} does not use the preprocessed data {data}: {reason}."
            found = Preprocessed(folder / own, PlansManager(plans), name)
            reason = found.differing() or (found.wrong(fingerprint, cases) if known else None)
        if reason or not found.has(cases):
            wanted.append(name)
    if wanted:
        yield (
            f"Preprocess before training, unless nnUNetv2_plan_and_preprocess does it now: nnUNetv2_preprocess -d "
            f"{number_of(plans['dataset_name'])} -plans_name {plans['plans_name']} -c {' '.join(wanted)}\n"
        )


@dataclass(frozen=True)
class Preprocessed:
    """Preprocessed data of a configuration.

    Args:
        folder: Folder that they lie in, or will.
        plans: Holding the configuration.
        configuration: Its name.
    """

    folder: Path
    plans: PlansManager
    configuration: str

    def has(self, cases: Sequence[str]) -> bool:
        """Whether every case is there, with all its files."""
        return all(
            any(all((self.folder / f"{case}{end}").is_file() for end in ends) for ends in _FILES) for case in cases
        )

    def differing(self) -> str | None:
        """What the plans that own these data preprocess otherwise: others, else earlier ones of this name."""
        ours = preprocessing(self.plans, self.configuration)
        owners = list(_owners(self.folder))
        earlier = owners if self.folder.is_dir() else []
        for name, plans, configuration in [o for o in owners if o[0] != self.plans.plans_name] or earlier:
            try:
                theirs = preprocessing(plans, configuration)
            except (KeyError, TypeError) as error:
                return f"{name} does not say how they are made ({error!r})"
            for key, value in ours.items():
                if not _same(value, theirs[key]):
                    values = "" if key == _INTENSITIES else f", {theirs[key]}, here {value}"
                    return f"{name} has other {key}{values}"
        return None

    def wrong(self, fingerprint: Mapping[str, Any], cases: Sequence[str]) -> str | None:
        """What shows that the files there were made with another spacing, or of other images.

        Data that an older nnU-Net stored as .npz or .npy are taken to be right.

        Args:
            fingerprint: Fingerprint of the data set.
            cases: Names of the training cases, in the fingerprint's order.
        """
        forward = self.plans.transpose_forward
        target = self.plans.get_configuration(self.configuration).spacing
        shapes, spacings = fingerprint["shapes_after_crop"], fingerprint["spacings"]
        for case, *values in zip(cases, shapes, spacings, strict=True):
            shape, spacing = ([value[axis] for axis in forward] for value in values)
            new = compute_new_shape(shape, spacing, [*spacing[: 3 - len(target)], *target]).tolist()
            for path in (self.folder / f"{case}{end}" for end in (".b2nd", "_seg.b2nd")):
                there = _stored_shape(path) if path.is_file() else new
                if there is None:
                    return f"{path.name} there is cut off"
                if there != new:
                    return f"{path.name} there has the shape {there}, with this spacing it has {new}"
        return None


def preprocessing(plans: PlansManager, configuration: str) -> dict[str, Any]:
    """All that decides what the preprocessed data of a configuration look like.

    Raises:
        KeyError: the plans lack it.
    """
    found = plans.get_configuration(configuration)
    return {
        "spacing": found.spacing,
        "transpose_forward": plans.transpose_forward,
        "image_reader_writer": plans.plans["image_reader_writer"],
        **{key: found.configuration[key] for key in _READ},
        _INTENSITIES: plans.foreground_intensity_properties_per_channel,
    }


def _stored_shape(path: Path) -> list[int] | None:
    """Without channels; None for a file that was cut off."""
    import blosc2

    try:
        return list(blosc2.open(str(path), mode="r").shape[1:])
    except RuntimeError:
        return None


def _owners(folder: Path) -> Iterator[tuple[str, PlansManager, str]]:
    """Name, plans and configuration of all whose data lie in this folder."""
    for path in sorted(folder.parent.glob("*.json")):
        try:
            plans = PlansManager(read_plans(path, "plan again"))
        except UsageError:
            continue  # nobody can have preprocessed with it
        for name in plans.available_configurations:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that plans are old
                    is_owner = plans.get_configuration(name).data_identifier == folder.name
            except (KeyError, ValueError, RuntimeError, TypeError):
                continue  # no data can belong to it
            if is_owner:
                yield path.stem, plans, name


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, Sequence) and isinstance(other, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return isclose(one, other, rel_tol=1e-5) or (np.isnan(one) and bool(np.isnan(other)))
    return bool(one == other)
