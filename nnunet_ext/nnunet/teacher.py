"""The trained model that teaches a smaller one: what the user asks for, and which of its folds may teach which case.

A fold may teach the cases that it has not seen. Which these are its own validation says, whose cases
``fold_X/validation/summary.json`` lists, so that it holds for models that any nnU-Net has trained.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path, PureWindowsPath
from typing import Any

from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT
from nnunet_ext.nnunet.model_folder import ModelFolder
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.printable import counted, first_few

VARIABLE = "nnUNet_teacher"
KEY = "distillation"  # in plans.json
RESULTS = "nnUNet_results"
_NAME_IT = (
    f"set {VARIABLE} to the folder of a trained model (TRAINER__PLANS__CONFIGURATION, below {RESULTS} or a path), or "
    f'write "{KEY}": {{"teacher": FOLDER}} into the plans'
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """How a student is to be taught: `KEY` of the plans; the environment names the teacher before they do.

    Args:
        teacher: Folder of a trained model, a path or a name below nnUNet_results/DATASET; None: none is named.
        temperature: Divides the logits of teacher and student (T).
        weight: Of the teacher in the loss (a), from 0 to 1; the labels have the rest.
        unlabelled: Folder of images without labels, named as in imagesTs; None: none.
        unlabelled_share: Of the patches, that are drawn from these.

    Raises:
        UsageError: a value is out of its range.
    """

    teacher: str | None = None
    temperature: float = 2.0
    weight: float = 0.5
    unlabelled: str | None = None
    unlabelled_share: float = 0.25

    def __post_init__(self) -> None:
        rules = {
            "teacher": (self.teacher is None or _is_text(self.teacher), "the folder of a trained model"),
            "temperature": (_is_number(self.temperature) and self.temperature > 0, "a number above 0"),
            "weight": (_is_number(self.weight) and 0 <= self.weight <= 1, "a number from 0 to 1"),
            "unlabelled": (self.unlabelled is None or _is_text(self.unlabelled), "a folder of images"),
            "unlabelled_share": (
                _is_number(self.unlabelled_share) and 0 < self.unlabelled_share < 1,
                "a number between 0 and 1",
            ),
        }
        for name, (is_right, rule) in rules.items():
            if not is_right:
                raise UsageError(f"{KEY}, {name}: must be {rule}, got {getattr(self, name)!r:.80}: correct the plans.")

    @classmethod
    def of(cls, plans: Mapping[str, Any], **defaults: Any) -> Request:
        """What plans and environment ask for.

        Args:
            plans: Content of plans.json.
            defaults: Values of what neither says.

        Raises:
            UsageError: the plans hold something else.
        """
        asked = plans.get(KEY, {})
        known = [field.name for field in fields(cls)]
        if not isinstance(asked, Mapping) or set(asked) - set(known):
            raise UsageError(f"{KEY} in the plans must hold {', '.join(known)}, got {asked!r:.80}: correct the plans.")
        named = os.environ.get(VARIABLE)
        return cls(**{**defaults, **asked, **({"teacher": named} if named else {})})


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def find_teacher(name: str | None, dataset: str) -> ModelFolder:
    """Find a trained model.

    Args:
        name: Its name below nnUNet_results/DATASET, or below nnUNet_results, or a path.
        dataset: Name of the data set.

    Raises:
        UsageError: none is named, or there is none.
    """
    if name is None:
        raise UsageError(f"a distilled trainer needs a teacher, none is named: {_NAME_IT}.")
    path, results = Path(name.strip()).expanduser(), os.environ.get(RESULTS)
    places = [path]
    if results and not name.startswith((".", "~", "/")):
        places = [Path(results, dataset, path), Path(results, path), path]
    return ModelFolder.read(next(filter(Path.is_dir, places), places[0]), "the teacher must be", _NAME_IT)


def check_fits(teacher: Setting, student: Setting, folder: Path) -> None:
    """See that a teacher was trained for the same images, labels and preprocessing as the student is.

    Args:
        teacher, student: Plans, data set and configuration of both.
        folder: Of the teacher.

    Raises:
        UsageError: it was not, or the student's patch is none for its network.
    """
    mine, its = _facts(student), _facts(teacher)
    if its["spacing"] and mine["spacing"] and len(its["spacing"]) == len(mine["spacing"]):
        is_close = all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(its["spacing"], mine["spacing"], strict=True))
        its["spacing"] = mine["spacing"] if is_close else its["spacing"]
    for what, value in its.items():
        if value != mine[what]:
            raise UsageError(
                f"the teacher must have the student's {what}, {mine[what]}, got {value} in {folder}: name a model of "
                "this data set and configuration, or plan the student as it was planned."
            )
    if any(n % stride for n, stride in zip(student.patch_size, teacher.strides, strict=True)):
        raise UsageError(
            f"the student's patch {list(student.patch_size)} must be divisible by the strides of the teacher's "
            f"network, {list(teacher.strides)}: change patch_size of the student's plans, or name another teacher."
        )


def _facts(setting: Setting) -> dict[str, Any]:
    """What the images and labels that a network sees depend on, by its name in a sentence."""
    configuration = setting.configuration_manager.configuration
    facts = {
        "data set": setting.plans.get("dataset_name"),
        "labels": setting.dataset.get("labels"),
        "regions_class_order": setting.dataset.get("regions_class_order"),
        "channel_names": setting.dataset.get("channel_names"),
        "number of axes": len(setting.patch_size),
        "cascade stage": "second" if configuration.get("previous_stage") else "first",
        "order of axes": setting.plans.get("transpose_forward"),
        "spacing": configuration.get("spacing"),
        "normalization_schemes": configuration.get("normalization_schemes"),
        "use_mask_for_norm": configuration.get("use_mask_for_norm"),
        "preprocessor_name": configuration.get("preprocessor_name"),
    }
    if "CTNormalization" in (configuration.get("normalization_schemes") or ()):
        facts["intensities of the foreground"] = setting.plans.get("foreground_intensity_properties_per_channel")
    return facts


def held_out(teacher: ModelFolder, fold: str) -> set[str]:
    """Cases that a fold of a trained model has validated, so that it has not been trained on them.

    Raises:
        UsageError: it has not been validated.
    """
    path = teacher.fold_folder(fold) / "validation" / "summary.json"
    cure = f"validate fold {fold} of the teacher, with the split that it was trained with (nnUNetv2_train ... --val)"
    try:
        rows = read_json(path, cure)["metric_per_case"]
        files = [PureWindowsPath(row["prediction_file"]).name for row in rows]  # separators of any system
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} must hold nnU-Net's metric_per_case, it does not: {cure}.") from error
    return {file.removesuffix(teacher.dataset["file_ending"]) for file in files}


def teaching_folds(
    teacher: ModelFolder,
    fold: int | str,
    training: Sequence[str],
    validation: Sequence[str],
    splits: Sequence[Mapping[str, Collection[str]]],
) -> dict[str, str]:
    """Tell which fold of the teacher teaches each training case of a student, so that nothing leaks.

    In cross-validation it is the student's own fold, which has held back the student's validation cases. For the
    model that is trained on all cases it is the one fold that has held the case back.

    Args:
        teacher: Trained model.
        fold: Of the student, a number or "all".
        training, validation: The student's cases; those of "all" are the same.
        splits: Content of splits_final.json, where there is one.

    Raises:
        UsageError: a fold is missing, or one would teach, or has been trained on, what it must not have seen.
    """
    if fold != "all":
        _check_fold(teacher, str(fold))
        _check_unseen(teacher, str(fold), validation, training)
        return dict.fromkeys(training, str(fold))
    found: dict[str, str] = {}
    for name in (name for name in teacher.folds_with(FINAL_CHECKPOINT) if name != "all"):
        for case in sorted(held_out(teacher, name) & set(training)):
            found.setdefault(case, name)
    if missing := sorted(set(training) - set(found)):
        raise UsageError(
            f"each training case of fold all must be taught by the fold of the teacher that has not been trained on "
            f"it, but no fold of {teacher.folder} has held back {counted(len(missing), 'case')} "
            f"({first_few(missing)}): train and validate the missing folds of the teacher."
        )
    for name in sorted(set(found.values())):
        trained = splits[int(name)].get("train", ()) if int(name) < len(splits) else ()
        _check_unseen(teacher, name, [case for case, of in found.items() if of == name], trained)
    return found


def _check_fold(teacher: ModelFolder, fold: str) -> None:
    there = teacher.folds_with(FINAL_CHECKPOINT)
    if fold not in there:
        raise UsageError(
            f"fold {fold} may be taught by the teacher's fold {fold} alone, every other has been trained on its "
            f"validation cases; {teacher.folder} has {FINAL_CHECKPOINT} of {', '.join(there) or 'no fold'}: train that "
            "fold of the teacher first."
        )


def _check_unseen(teacher: ModelFolder, fold: str, cases: Collection[str], trained: Collection[str]) -> None:
    """See that a fold has held back cases, and has validated none of those that it is trained on today."""
    validated = held_out(teacher, fold)
    if unknown := sorted(set(cases) - validated):
        raise UsageError(
            f"fold {fold} of the teacher must have held back what its student has not seen, but its validation lacks "
            f"{counted(len(unknown), 'case')} ({first_few(unknown)}; {teacher.folder}): train the teacher with the "
            "split of its student."
        )
    if seen := sorted(validated & set(trained)):
        raise UsageError(
            f"fold {fold} of the teacher must not have validated training cases of splits_final.json, it has "
            f"{counted(len(seen), 'case')} ({first_few(seen)}; {teacher.folder}): the split has changed since, and "
            "nothing tells what it has been trained on. Train the teacher again, with an empty folder validation."
        )
    _check_log(teacher, fold, len(trained))


def _check_log(teacher: ModelFolder, fold: str, trained: int) -> None:
    """See that the logs of a fold, where they are there, tell of a split like today's."""
    for path in sorted(teacher.fold_folder(fold).glob("training_log_*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        counts = {int(count) for count in re.findall(r"split has (\d+) training and \d+ validation cases", text)}
        overlaps = "Some validation cases are also in the training set" in text
        if overlaps or (trained and counts - {trained}):
            what = "validation cases that were training cases too" if overlaps else f"{max(counts)} training cases"
            raise UsageError(
                f"fold {fold} of the teacher must have been trained with the split of its student, which has {trained} "
                f"training cases, but {path} tells of {what}: train the teacher with this split, or move logs of other "
                "trainings away."
            )
