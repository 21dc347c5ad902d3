"""The optional parts of this package: what they import, and the line that says what is missing."""

from __future__ import annotations

import importlib.util

from nnunet_ext import installation
from nnunet_ext.errors import UsageError

MODULES = {
    "report": ("matplotlib", "jinja2", "surface_distance"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "nncf"),
    "cluster": ("submitit",),
}


def need(extra: str, what: str) -> None:
    """Refuse to go on without the packages of an extra.

    Args:
        extra: Name of it.
        what: Command or option that needs it.

    Raises:
        UsageError: names what is missing.
    """
    missing = [name for name in MODULES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        distributions = tuple(name.replace("_", "-") for name in MODULES[extra])
        raise UsageError(
            f"{what} needs the extra [{extra}] of this package, missing is {', '.join(missing)}: "
            f"{installation.extra(extra, distributions)}."
        )
