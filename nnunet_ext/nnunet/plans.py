"""plans.json of nnU-Net, checked where it comes in and resolved by nnU-Net's own handler.

What it holds comes from other people: values have the wrong type, names are paths, configurations inherit in a circle.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from numbers import Real
from pathlib import Path
from typing import Any

from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json
from nnunet_ext.nnunet.values import is_int, is_list_of, is_plain_name, shown

DEFAULT_PLANS = "nnUNetPlans"
_NAMES = ("dataset_name", "plans_name")
_LINKS = ("previous_stage", "next_stage", "inherits_from")


def read_plans(path: Path, cure: str) -> dict[str, Any]:
    """Read a plans file.

    Args:
        path: File to read.
        cure: What to do when it can't be used, as the end of a sentence.

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
            raise UsageError(f"{path}, configuration {name}: must be a dictionary, got {shown(content)}: {cure}.")
        names |= {f"{name}, {key}": value for key in _LINKS for value in _as_list(content.get(key))}
    _check_names({**names, **{f"configuration {name}": name for name in configurations}}, path, cure)
    return plans


def configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration as nnU-Net's own handler resolves it, with what it inherits and the network of old plans.

    Args:
        plans: Content of plans.json; left as it is.
        name: Name of the configuration.

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


def _check_names(names: Mapping[str, Any], path: Path, cure: str) -> None:
    for key, value in names.items():
        if not is_plain_name(value):
            raise UsageError(f"{path}, {key}: must be a name and no path, got {shown(value)}: {cure}.")


def _check_values(found: Mapping[str, Any], where: str) -> None:
    for key, (is_right, rule) in _CONFIGURATION.items():
        value = found.get(key)
        if not is_right(value):
            raise UsageError(f"{where}: {key} must be {rule}, got {shown(value)}: plan the data set again.")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:200]


def _is_size(value: Any) -> bool:
    return is_list_of(value, lambda n: is_int(n, 1)) and len(value) in (2, 3)


def _is_spacing(value: Any) -> bool:
    return value is None or is_list_of(value, lambda step: isinstance(step, Real) and 0 < float(step) < float("inf"))


def _is_architecture(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("network_class_name"), str):
        return False
    arguments, imported = value.get("arch_kwargs"), value.get("_kw_requires_import")
    return isinstance(arguments, Mapping) and is_list_of(
        imported, lambda key: isinstance(key, str) and key in arguments
    )


_CONFIGURATION = {
    "architecture": (
        _is_architecture,
        "a network with network_class_name, arch_kwargs and, of these, _kw_requires_import",
    ),
    "patch_size": (_is_size, "two or three numbers of voxels"),
    "batch_size": (lambda n: is_int(n, 1), "a number of patches"),
    "spacing": (_is_spacing, "positive numbers"),
}
