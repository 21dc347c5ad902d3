"""plans.json and dataset.json of nnU-Net, checked where they come in; plans are resolved by nnU-Net's own handler.

What they hold comes from other people: values have the wrong type, names are paths, configurations inherit in a circle.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json
from nnunet_ext.trust import is_host_name

_NAMES = ("dataset_name", "plans_name")
_LINKS = ("previous_stage", "next_stage", "inherits_from")


def read_plans(path: Path, cure: str) -> dict[str, Any]:
    """Read a plans file.

    Args:
        path: of the file.
        cure: what to do when it can't be used, as the end of a sentence.

    Raises:
        UsageError: it can't be read, holds no configurations, or names that are paths.
    """
    plans: dict[str, Any] = read_json(path, cure)
    configurations = plans.get("configurations")
    if not isinstance(configurations, dict) or not configurations:
        raise UsageError(f"plans of nnU-Net hold configurations, {path} holds none: {cure}.")
    names: dict[str, Any] = {key: plans[key] for key in _NAMES if key in plans}
    for name, content in configurations.items():
        if not isinstance(content, dict):
            raise UsageError(
                f"{path}, configuration {name}: must be a dictionary, got {_shown(content)}: {cure}."
            )
        names |= {f"{name}, {key}": value for key in _LINKS for value in _as_list(content.get(key))}
    _check_names({**names, **{f"configuration {name}": name for name in configurations}}, path, cure)
    return plans


def read_dataset(path: Path, cure: str, needed: Iterable[str] = ("labels", "file_ending")) -> dict[str, Any]:
    """Read a dataset.json.

    Args:
        path: of the file.
        cure: what to do when it can't be used, as the end of a sentence.
        needed: keys that it must have.

    Raises:
        UsageError: it can't be read, lacks a key, or has something else than nnU-Net writes.
    """
    content: dict[str, Any] = read_json(path, cure)
    if missing := [key for key in needed if content.get(key) is None]:
        raise UsageError(
            f"{path} must hold {' and '.join(needed)}, it lacks {' and '.join(missing)}: {cure}."
        )
    for key, (is_right, rule) in _DATASET.items():
        if key in content and not is_right(content[key]):
            raise UsageError(f"{path}: {key} must be {rule}, got {_shown(content[key])}: {cure}.")
    return content


def configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration as nnU-Net's own handler resolves it, with what it inherits and the network of old plans.

    Args:
        plans: content of plans.json; left as it is.
        name: of the configuration.

    Raises:
        UsageError: there is none, it inherits in a circle, or lacks what every training needs.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    shown, known = plans.get("plans_name", "that were given"), plans.get("configurations", {})
    if name not in known:
        raise UsageError(
            f"the plans {shown} have the configurations {', '.join(map(str, known)) or 'none'}, got {name}: choose one "
            "of them."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # plans of old versions of nnU-Net are read as well
            found: dict[str, Any] = PlansManager(deepcopy(dict(plans))).get_configuration(name).configuration
    except Exception as error:  # whatever nnU-Net meets in what it did not write
        raise UsageError(
            f"the plans {shown} must hold {name} as nnU-Net writes it, its handler fails with {_reason(error)}: plan "
            "the data set again, or copy the file again."
        ) from error
    _check_values(found, f"the plans {shown}, {name}")
    return found


def is_plain_name(value: Any) -> bool:
    """Whether a value can be the name of a file or folder, and no path to another place."""
    return isinstance(value, str) and value.isprintable() and not re.fullmatch(r"|\.\.?|.*[/\\].*", value)


def _check_names(names: Mapping[str, Any], path: Path, cure: str) -> None:
    for key, value in names.items():
        if not is_plain_name(value):
            raise UsageError(f"{path}, {key}: must be a name and no path, got {_shown(value)}: {cure}.")


def _check_values(found: Mapping[str, Any], where: str) -> None:
    for key, (is_right, rule) in _CONFIGURATION.items():
        value = found.get(key)
        if not is_right(value):
            raise UsageError(f"{where}: {key} must be {rule}, got {_shown(value)}: plan the data set again.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:200]


def _is_int(value: Any, smallest: int = 0) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= smallest


def _is_list_of(value: Any, is_right: Any) -> bool:
    is_listed = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
    return is_listed and all(is_right(item) for item in value)


def _is_label(value: Any) -> bool:
    def is_number(value: Any) -> bool:
        is_text, is_float = isinstance(value, str), isinstance(value, float)
        return _is_int(value) or (is_text and value.isdecimal()) or (is_float and value.is_integer())

    return is_number(value) or (_is_list_of(value, is_number) and len(value) > 0)


def _are_channels(value: Any) -> bool:
    return (
        isinstance(value, dict) and len(value) > 0 and all(isinstance(name, str) for name in value.values())
    )


def _is_case(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("label"), str):
        return False
    images = value.get("images")
    return isinstance(images, list) and len(images) > 0 and all(isinstance(path, str) for path in images)


def _is_size(value: Any) -> bool:
    return _is_list_of(value, lambda n: _is_int(n, 1)) and len(value) in (2, 3)


def _is_spacing(value: Any) -> bool:
    return value is None or _is_list_of(
        value, lambda step: isinstance(step, Real) and 0 < float(step) < float("inf")
    )


def _is_architecture(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("network_class_name"), str):
        return False
    arguments, imported = value.get("arch_kwargs"), value.get("_kw_requires_import")
    return isinstance(arguments, Mapping) and _is_list_of(
        imported, lambda key: isinstance(key, str) and key in arguments
    )


_CONFIGURATION = {
    "architecture": (
        _is_architecture,
        "a network with network_class_name, arch_kwargs and, of these, _kw_requires_import",
    ),
    "patch_size": (_is_size, "two or three numbers of voxels"),
    "batch_size": (lambda n: _is_int(n, 1), "a number of patches"),
    "spacing": (_is_spacing, "positive numbers"),
}
_DATASET = {
    "labels": (
        lambda value: isinstance(value, dict) and len(value) > 0 and all(map(_is_label, value.values())),
        "names with whole numbers or lists of them",
    ),
    "file_ending": (
        lambda value: is_plain_name(value) and not re.search(r"[*?\[\]]", value),
        "the ending of a file's name",
    ),
    "channel_names": (_are_channels, "numbers with names"),
    "modality": (_are_channels, "numbers with names"),
    "regions_class_order": (
        lambda value: value is None or _is_list_of(value, _is_int),
        "a list of whole numbers",
    ),
    "overwrite_image_reader_writer": (
        lambda value: value is not None and is_host_name("overwrite_image_reader_writer", value),
        "the name of a reader of nnU-Net",
    ),
    "dataset": (
        lambda value: (
            isinstance(value, dict) and all(map(is_plain_name, value)) and all(map(_is_case, value.values()))
        ),
        "names of cases with their images, a list of files, and label, a file",
    ),
}
