"""Which code a plans.json may name; docs/security.md says what else is trusted and what is not.

nnU-Net imports the dotted paths that plans hold and calls what it finds there, so that plans from elsewhere are a
program. Our commands admit classes of networks and layers only, of packages that the user has installed for this
purpose. Importing a module runs it: a path is judged before anything of it is imported.
"""

from __future__ import annotations

import importlib
import pydoc
from collections.abc import Iterable, Mapping
from functools import cache
from inspect import isabstract
from typing import Any

from nnunet_ext import registry
from nnunet_ext.errors import UsageError

PACKAGES = ("torch.nn", "dynamic_network_architectures", "nnunet_ext.architectures")
# Option of each command that builds what plans name.
OPTION: dict[str, Any] = {
    "action": "store_true",
    "help": "run code that the model's own files name; only for models of people whom you trust",
}
_SHOWN = 80  # characters of a refused value
_ALWAYS_IMPORTED = ("conv_op",)  # by trainers that take the batch norm which fits it, whatever the plans say
_SEARCHED = "dynamic_network_architectures.architectures"  # where nnU-Net looks for a network that has moved
# What nnU-Net looks up by bare name in a folder of its own: key -> folder, base class or None for a function.
_HOST: dict[str, tuple[str, str | None]] = {
    "image_reader_writer": ("imageio", "base_reader_writer.BaseReaderWriter"),
    "overwrite_image_reader_writer": ("imageio", "base_reader_writer.BaseReaderWriter"),
    "label_manager": ("utilities.label_handling", "label_handling.LabelManager"),
    "preprocessor_name": ("preprocessing", "preprocessors.default_preprocessor.DefaultPreprocessor"),
    "normalization_schemes": ("preprocessing.normalization", "default_normalization_schemes.ImageNormalization"),
    "resampling_fn_data": ("preprocessing.resampling", None),
    "resampling_fn_seg": ("preprocessing.resampling", None),
    "resampling_fn_probabilities": ("preprocessing.resampling", None),
}


def check_network(configuration: Mapping[str, Any]) -> None:
    """Refuse a network, or a layer of its arguments, that is no `nn.Module` of `PACKAGES` or a registered module.

    Args:
        configuration: Configuration of plans.json, with what it inherits.

    Raises:
        UsageError: names the first value that is not admitted.
    """
    architecture = configuration["architecture"]
    arguments = architecture["arch_kwargs"]
    _check_path("network_class_name", architecture["network_class_name"])
    for key in dict.fromkeys((*architecture["_kw_requires_import"], *_ALWAYS_IMPORTED)):
        if arguments.get(key) is not None:
            _check_path(key, arguments[key])


def check_host_names(*contents: Mapping[str, Any]) -> None:
    """Refuse names of readers, preprocessing and label managers that are not nnU-Net's own.

    nnU-Net takes whatever its modules hold by that name, also what they import.

    Args:
        contents: Content of plans.json, of its configuration, or of dataset.json.

    Raises:
        UsageError: names the first value that is not admitted.
    """
    for content in contents:
        for key, (folder, _) in _HOST.items():
            values = content.get(key)
            for name in values if isinstance(values, list) else [values]:
                if not is_host_name(key, name):
                    raise _refusal(key, name, f"what nnU-Net has in nnunetv2.{folder}")


def is_host_name(key: str, name: Any) -> bool:
    """Whether nnU-Net itself defines what this key of plans.json or dataset.json names, or it names nothing."""
    folder, base = _HOST[key]
    return name in (None, "None") or _is_of_host(name, f"nnunetv2.{folder}", base)


def _check_path(key: str, path: Any) -> None:
    parts = path.split(".") if isinstance(path, str) else []
    registered = _registered() if parts and not _below(path, PACKAGES) else {}
    packages = (*PACKAGES, *registered.values())
    refusal = _refusal(key, path, f"nn.Module classes of {', '.join(PACKAGES)} or a registered architecture")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts) or not _below(path, packages):
        raise refusal
    try:
        found = pydoc.locate(path)
    except pydoc.ErrorDuringImport as error:
        raise UsageError(f"{key} {path} can't be imported ({error.value!r}): repair its package.") from error
    if found is None and key == "network_class_name":
        found = _search(_SEARCHED, parts[-1])
    if not _is_module(found) or not (_below(found.__module__, packages) or path in registered):
        raise refusal


def _registered() -> dict[str, str]:
    """Dotted path of every usable registered architecture -> its module."""
    entries = (entry for entry in registry.entries("architectures") if not entry.refused)
    return {entry.value.replace(":", "."): entry.module for entry in entries}


def _below(path: str, packages: Iterable[str]) -> bool:
    return any(path.startswith(f"{package}.") or path == package for package in packages)


def _is_module(found: Any) -> bool:
    from torch import nn

    return isinstance(found, type) and issubclass(found, nn.Module)


def _is_of_host(name: Any, folder: str, base: str | None) -> bool:
    return isinstance(name, str) and name.isidentifier() and _finds(name, folder, base)


@cache
def _finds(name: str, folder: str, base: str | None) -> bool:
    found = _search(folder, name)
    if base is None:
        return callable(found) and _below(str(getattr(found, "__module__", "")), [folder])
    module, _, bare = base.rpartition(".")
    wanted = getattr(importlib.import_module(f"{folder}.{module}"), bare)
    return isinstance(found, type) and issubclass(found, wanted) and not isabstract(found)


def _search(package: str, name: str) -> Any:
    """Search as nnU-Net does: the first module below `package` that has the name."""
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    return recursive_find_python_class(importlib.import_module(package).__path__[0], name, package)


def _refusal(key: str, value: Any, rule: str) -> UsageError:
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return UsageError(
        f"plans of others may name {rule}, got {key} {shown}: install the package that registers it, or give --trust "
        "if you trust whoever made the model with all that you may do here (docs/security.md)."
    )
