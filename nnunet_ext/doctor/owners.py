"""Which distribution a file belongs to: whose code breaks a name, and who stands in the way of a module."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from nnunet_ext.doctor.finding import Finding, failure

# Through their code runs what others break; the name of the breaker says more.
_PASSED_THROUGH = ("nnunet-ext", "nnunetv2", "torch")
_TOP_LEVEL = re.compile(r"^([^/,\n]+)(?:/__init__)?\.py,", flags=re.MULTILINE)


def label(distribution: Distribution) -> str:
    """Name and version, or the folder of the metadata where they can't be read."""
    try:
        name, number = distribution.metadata["Name"], distribution.version
    except Exception:
        name = number = ""
    return f"{name} {number}" if name else str(getattr(distribution, "_path", "an unnamed distribution"))


def record(distribution: Distribution) -> str:
    """Files of a distribution as its RECORD lists them; empty where it can't be read."""
    try:
        return distribution.read_text("RECORD") or ""
    except (OSError, ValueError):
        return ""


def owner(path: str) -> str:
    """Distribution that lists a file; empty where none does."""
    for distribution in distributions():
        root = os.path.realpath(str(distribution.locate_file("")))
        relative = os.path.relpath(os.path.realpath(path), root).replace(os.sep, "/")
        if re.search(rf'^"?{re.escape(relative)}"?,', record(distribution), flags=re.MULTILINE):
            return label(distribution)
    return ""


def described(path: str) -> str:
    """A file and whose it is."""
    return f"{path} ({owner(path) or 'of no distribution'})"


def culprit(error: BaseException) -> str:
    """Distribution or file of others whose code an error comes from; empty where it is nobody else's."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    named = [*_named(error)]
    passed = [frame.filename for frame in reversed(traceback.extract_tb(error.__traceback__))]  # the last one first
    for path in (*named, *passed):
        found = owner(path)
        # Python's own files, and those of an editable install, have no owner either.
        if found.partition(" ")[0].lower() not in ("", *_PASSED_THROUGH):
            return found
        if not found and path in named and _stands_on_path(path):
            return path
    return ""


def _named(error: BaseException) -> Iterator[str]:
    """File of the module in which an error says that something is missing."""
    if isinstance(error, ModuleNotFoundError):  # what stands for its package may be none
        yield from _file_of(sys.modules.get((error.name or "").rpartition(".")[0]))
    elif isinstance(error, ImportError):
        yield from filter(None, [error.path])
    elif isinstance(error, AttributeError):
        yield from _file_of(error.obj)


def _file_of(module: object) -> list[str]:
    path = getattr(module, "__file__", None)
    return [path] if isinstance(path, str) else []


def _stands_on_path(path: str) -> bool:
    """Whether a file lies below a folder that Python searches, other than its own."""
    own, place = Path(os.__file__).resolve().parent, Path(path).resolve()
    return any(
        Path(folder).resolve() in place.parents for folder in sys.path if folder and Path(folder).resolve() != own
    )


def shadowed(wanted: list[Distribution]) -> Iterator[Finding]:
    """Find modules of distributions that are imported from a file of others, without importing them."""
    for distribution in wanted:
        for module in {*_TOP_LEVEL.findall(record(distribution))} - sys.stdlib_module_names:
            meant = [Path(str(distribution.locate_file(f"{module}{end}"))) for end in (".py", "/__init__.py")]
            spec = importlib.util.find_spec(module) if module.isidentifier() else None
            if spec is None or not any(path.is_file() for path in meant):
                continue
            origin = spec.origin or ", ".join(spec.submodule_search_locations or [])
            if not any(path.is_file() and os.path.realpath(path) == os.path.realpath(origin) for path in meant):
                detail = f"{module} of {label(distribution)} is hidden by {described(origin)}"
                yield failure("shadow", detail, f"rename or uninstall {owner(origin) or origin}")
