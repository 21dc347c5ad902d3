"""Classes of trainers by name, ours, other packages' and nnU-Net's own."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nnunet_ext import registry
from nnunet_ext.errors import UsageError


def trainer_class(name: str) -> Any:
    """Class of a trainer: one of ours, one of nnU-Net's own, with or without a schedule's suffix.

    Raises:
        UsageError: there is none, or it can't be loaded.
    """
    found = None
    try:
        return registry.resolve("trainers", name)
    except registry.RegistryError as error:
        raise UsageError(str(error)) from error
    except registry.UnknownNameError:
        with _without_hints(), suppress(RuntimeError, AssertionError, TypeError):  # unknown, or no trainer
            found = search_host(name)
    if not callable(getattr(found, "build_network_architecture", None)):
        cure = registry.cure_for("trainers", name) or "`nnunet-ext list` shows all names."
        raise UsageError(
            f"a trainer must be known to nnU-Net or registered, got {name}: correct it, or install the package that it "
            f"comes from. {cure}"
        )
    return found


@contextmanager
def _without_hints() -> Iterator[None]:
    """The last line says what the hook would say above it while nnU-Net searches."""
    logger = logging.getLogger("nnunet_ext")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def search_host(name: str) -> Any:
    """Search as nnU-Net itself does; where it finds nothing, 2.8 raises and 2.7 returns None."""
    try:
        module = importlib.import_module("nnunetv2.utilities.find_objects")
    except ModuleNotFoundError:  # before nnU-Net 2.8
        import nnunetv2
        from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

        folder = os.path.join(nnunetv2.__path__[0], "training", "nnUNetTrainer")
        return recursive_find_python_class(folder, name, "nnunetv2.training.nnUNetTrainer")
    return module.recursive_find_trainer_class_by_name(name)
