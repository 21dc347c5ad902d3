"""Lets nnU-Net's own, unmodified lookup find the trainers and planners of nnunet_ext's registry.

PyTorch calls `install` at the end of `import torch` (entry-point group ``torch.backends``). It places a
finder on `sys.meta_path` that touches two modules of nnU-Net only: the first ones that nnU-Net's search meets
when it looks for a trainer or a planner. They receive a module ``__getattr__`` (PEP 562), which asks the
registry for names that the module itself does not have.

Standard library only, and nothing here may raise: an exception would break `import torch` for the whole
environment. What goes wrong is kept in `errors`, for `nnunet-ext doctor`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import itertools
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

TARGETS = {
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer": "trainers",
    "nnunetv2.experiment_planning.plan_and_preprocess_api": "planners",
}

errors: list[str] = []


def lookup(kind: str, name: str) -> Any:
    """Return the registered class `name` of `kind` ("trainers" or "planners").

    Raises:
        AttributeError: the registry does not hold the name, or can't be read (kept in `errors`).
        nnunet_ext.registry.RegistryError: the name is registered, but its class can't be loaded.
    """
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        from nnunet_ext.registry import RegistryError, UnknownNameError, resolve, suggest
    except Exception as error:
        errors.append(f"nnunet_ext.registry can't be imported: {error!r}")
        raise AttributeError(name) from error
    try:
        try:
            return resolve(kind, name)
        except UnknownNameError:
            suggest(kind, name)
            raise
    except RegistryError:
        raise
    except UnknownNameError as error:
        raise AttributeError(name) from error
    except Exception as error:  # nnU-Net's search for its own names passes here too and must go on
        errors.append(f"the registry can't look up {name}: {error!r}")
        raise AttributeError(name) from error


def _attach(module: ModuleType) -> None:
    """Give `module` a ``__getattr__`` that asks the one it had first, then the registry."""
    kind = TARGETS[module.__name__]
    previous: Callable[[str], Any] | None = module.__dict__.get("__getattr__")
    if _is_ours(previous):
        return

    def __getattr__(name: str) -> Any:  # noqa: N807
        if previous is not None:
            try:
                return previous(name)
            except AttributeError:
                pass
        try:
            return lookup(kind, name)
        except AttributeError:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}") from None

    __getattr__._from_nnunet_ext = True  # type: ignore[attr-defined]
    module.__dict__["__getattr__"] = __getattr__


def _is_ours(thing: object) -> bool:
    """Tell our finders and ``__getattr__`` from others', also those of another copy of this module."""
    return getattr(thing, "_from_nnunet_ext", False) is True


def _attach_imported() -> None:
    """Attach to the targets that are imported already; never raises.

    `import nnunetv2...nnUNetTrainer` imports torch, so a target may be half executed. And a finder that stands
    before ours can load a target: the imports that follow, in that module or in nnU-Net's search, come here.
    """
    for name in TARGETS:
        module = sys.modules.get(name)
        try:
            if module is not None and not _is_ours(module.__dict__.get("__getattr__")):
                _attach(module)
        except Exception as error:
            message = f"{name} can't be extended: {error!r}"
            errors.extend([message] if message not in errors else [])


class Finder(importlib.abc.MetaPathFinder):
    """Finds the two target modules as the other finders do and attaches to them once they have run."""

    _from_nnunet_ext = True
    _asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the other finders' spec for a target module, its loader extended; None for other names."""
        # Another finder that asks the others, as this one does, comes back here before it has an answer.
        if fullname not in TARGETS or getattr(self._asking, "name", None) == fullname:
            _attach_imported()
            return None
        self._asking.name = fullname
        try:
            return self._ask_others(fullname, path, target)
        finally:
            self._asking.name = None

    def _ask_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                _extend_loader(spec)
                return spec
        return None


def _extend_loader(spec: importlib.machinery.ModuleSpec) -> None:
    try:
        execute = spec.loader.exec_module  # type: ignore[union-attr]

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ in TARGETS:
                _attach(module)

        spec.loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
    except Exception as error:
        errors.append(f"the loader of {spec.name} can't be extended: {error!r}")


def is_installed() -> bool:
    """Tell whether the finder stands on `sys.meta_path`."""
    return any(isinstance(finder, Finder) for finder in sys.meta_path)


def bypassed() -> list[str]:
    """Say of each target that was imported without our extension which finders stand before ours."""
    before = list(itertools.takewhile(lambda finder: not _is_ours(finder), sys.meta_path))
    names = ", ".join(getattr(finder, "__qualname__", type(finder).__qualname__) for finder in before)
    return [
        f"{name} was loaded past our finder, before which stand: {names or 'none'}"
        for name in TARGETS
        if name in sys.modules and not _is_ours(getattr(sys.modules[name], "__getattr__", None))
    ]


def install() -> None:
    """Place the finder instead of other copies' finders; a second call changes nothing. Never raises."""
    try:
        if not is_installed():
            sys.meta_path[:] = [Finder(), *(finder for finder in sys.meta_path if not _is_ours(finder))]
    except Exception as error:
        errors.append(f"the hook can't be installed: {error!r}")
    _attach_imported()
