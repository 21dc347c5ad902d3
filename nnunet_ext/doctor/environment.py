"""Checks of the environment in which nnU-Net runs: metadata, hook, collisions, folders."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from nnunet_ext.doctor.finding import Finding, failure, ok, warning
from nnunet_ext.doctor.owners import culprit, label
from nnunet_ext.installation import DISTRIBUTION, reinstall
from nnunet_ext.printable import counted, typed_line

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
# folder of nnU-Net -> whether commands write into it
FOLDERS = {"nnUNet_raw": False, "nnUNet_preprocessed": True, "nnUNet_results": True}


def metadata() -> Iterator[Finding]:
    """Find distributions whose metadata can't be read: one of them can stop `import torch` for all."""
    for distribution in distributions():
        try:
            _ = distribution.metadata["Name"], list(distribution.entry_points)
        except Exception as error:
            folder = getattr(distribution, "_path", "a distribution")
            detail = f"{folder} can't be read: {typed_line(error)}"
            yield failure("metadata", detail, "repair or uninstall that distribution")


def torch_cure(error: BaseException) -> str:
    """Say what to do about an `import torch` that fails with `error`."""
    backend = re.search(r"backend extension: (\w+)", str(error))
    if backend and backend[1] != "nnunet_ext":
        return f"repair or uninstall {_backends().get(backend[1]) or f'what registers {backend[1]} in torch.backends'}"
    if backend:
        return reinstall()
    found = culprit(error)
    return f"repair or uninstall {found}" if found else "repair torch: its own `python -c 'import torch'` fails as well"


def backends_cure() -> str:
    """Say what to do about an `import torch` that does not come back."""
    others = {name: by for name, by in _backends().items() if name != "nnunet_ext"}
    named = "; ".join(f"{by}, entry point {name} of torch.backends" for name, by in others.items())
    return f"repair or uninstall {named}" if named else "see whether `python -c 'import torch'` works"


def _backends() -> dict[str, str]:
    """Entry points that PyTorch calls when it is imported -> their distributions."""
    found: dict[str, str] = {}
    for distribution in distributions():
        try:
            points = [point.name for point in distribution.entry_points if point.group == "torch.backends"]
        except Exception:  # `metadata` says so
            continue
        found |= dict.fromkeys(points, label(distribution))
    return found


def host() -> Finding:
    """Tell whether nnU-Net can be imported at all."""
    spec = importlib.util.find_spec("nnunetv2")
    if spec is None:
        return failure("nnunetv2", "can't be imported", "pip install nnunetv2")
    if spec.origin is None:
        left = ", ".join(spec.submodule_search_locations or [])
        cure = "uninstall nnunetv2, delete these folders, install it again"
        return failure("nnunetv2", f"is a folder without its __init__.py: {left}", cure)
    return ok("nnunetv2", spec.origin)


def hook() -> Iterator[Finding]:
    """Tell whether PyTorch has installed the hook, and what has gone wrong in it."""
    value = os.environ.get(AUTOLOAD, "1")
    if value != "1":
        cure = f"unset {AUTOLOAD}, or run nnU-Net's commands as `nnunet-ext run nnUNetv2_train ...`"
        yield failure("hook", f"{AUTOLOAD}={value} keeps PyTorch from installing it", cure)
    module = sys.modules.get("_nnunet_ext_hook")
    if module is not None and module.is_installed():
        yield ok("hook", f"installed from {module.__file__}")
        for error in dict.fromkeys(module.errors):
            yield failure("hook", error, reinstall())
        for past in module.bypassed():
            yield failure("hook", past, "do without them, or import torch after them")
    elif value == "1":
        yield failure("hook", "import torch didn't install it (entry point torch.backends)", reinstall())


def lookup_cure(distribution: str, breaker: str = "") -> str:
    """Say what to do about a registered name that nnU-Net doesn't find.

    Args:
        distribution: Where the name comes from.
        breaker: What breaks it, where that is another.
    """
    module = sys.modules.get("_nnunet_ext_hook")
    if module is None or not module.is_installed():
        return "repair the hook first, see there"
    return f"repair or uninstall {breaker or distribution}"


def collisions() -> Iterator[Finding]:
    """Find other distributions that install our top-level modules, and second copies on the path."""
    from packaging.utils import canonicalize_name

    others = {
        label(distribution)
        for distribution in distributions()
        if _installs_our_modules(distribution) and canonicalize_name(label(distribution).split()[0]) != DISTRIBUTION
    }
    for other in sorted(others):
        yield failure("collision", f"{other} installs our modules as well", f"uninstall it, then {reinstall()}")
    for module in ("nnunet_ext/__init__.py", "_nnunet_ext_hook.py"):
        copies = {str(Path(folder, module).resolve()) for folder in sys.path if Path(folder, module).is_file()}
        if len(copies) > 1:
            cure = f"uninstall {DISTRIBUTION} until none is left, delete the rest, then {reinstall()}"
            yield failure(
                "collision", f"{module} exists {counted(len(copies), 'time')}: {', '.join(sorted(copies))}", cure
            )


def _installs_our_modules(distribution: Distribution) -> bool:
    try:
        files = f"{distribution.read_text('RECORD') or ''}\n{distribution.read_text('top_level.txt') or ''}"
    except ValueError:  # no UTF-8; `metadata` says so
        return False
    return re.search(r"^(nnunet_ext(/|$)|_nnunet_ext_hook(\.py|$))", files, flags=re.MULTILINE) is not None


def folders() -> Iterator[Finding]:
    """Check that nnU-Net's three folders are set, exist and can be written."""
    for name, is_written in FOLDERS.items():
        folder = os.environ.get(name)
        if not folder:
            yield warning(name, "isn't set", f"export {name}=/path/of/your/folder")
        elif not os.path.isdir(folder):
            yield failure(name, f"{folder} is no folder", f"mkdir -p {shlex.quote(folder)}, or correct {name}")
        elif not os.access(folder, os.W_OK | os.X_OK):
            level = failure if is_written else warning
            yield level(name, f"{folder} can't be written", "change its permissions, or use another folder")
        else:
            yield ok(name, folder)
