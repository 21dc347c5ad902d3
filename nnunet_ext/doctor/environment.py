"""Checks of the environment in which nnU-Net runs: versions, hook, collisions, folders, device."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distributions, requires, version
from pathlib import Path

from nnunet_ext.doctor.finding import Finding, failure, ok, warning
from nnunet_ext.installation import DISTRIBUTION, reinstall
from nnunet_ext.printable import counted, typed_line

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
COMPILE = "nnUNet_compile"
REPORTED = ("torch", "nnunetv2", "dynamic-network-architectures")
# folder of nnU-Net -> whether commands write into it
FOLDERS = {"nnUNet_raw": False, "nnUNet_preprocessed": True, "nnUNet_results": True}


def versions() -> Iterator[Finding]:
    """Python and the distributions that decide, compared with what this package asks for."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    yield ok("python", f"{platform.python_version()} ({sys.executable})")
    try:
        yield ok(DISTRIBUTION, version(DISTRIBUTION))
        lines = {line: Requirement(line) for line in requires(DISTRIBUTION) or []}
    except PackageNotFoundError:
        yield failure(DISTRIBUTION, "is on the path, but not installed: it has no entry points", reinstall())
        lines = {}
    wanted: dict[str, str] = {canonicalize_name(r.name): line for line, r in lines.items() if not r.marker}
    for name in REPORTED:
        try:
            found = version(name)
        except PackageNotFoundError:
            yield failure(name, "isn't installed", f"pip install {name}")
            continue
        requirement = wanted.get(name, name)
        if satisfies(found, requirement):
            yield ok(name, found)
        else:
            yield failure(name, f"{found}, but needed is {requirement}", f'pip install "{requirement}"')


def metadata() -> Iterator[Finding]:
    """Find distributions whose metadata can't be read: one of them can stop `import torch` for all."""
    for distribution in distributions():
        try:
            _ = distribution.metadata["Name"], list(distribution.entry_points)
        except Exception as error:
            folder = getattr(distribution, "_path", "a distribution")
            detail = f"{folder} can't be read: {typed_line(error)}"
            yield failure("metadata", detail, "repair or uninstall that distribution")


def satisfies(found: str, requirement: str) -> bool:
    """Tell whether a version lies within the bounds of a requirement; a prerelease counts as its release."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    return Requirement(requirement).specifier.contains(Version(found).base_version)


def torch_cure(error: BaseException) -> str:
    """Say what to do about an `import torch` that fails with `error`."""
    backend = re.search(r"backend extension: (\w+)", str(error))
    if backend and backend[1] != "nnunet_ext":
        return f"repair or uninstall the distribution whose entry point torch.backends is called {backend[1]}"
    return reinstall() if backend else "repair torch: its own `python -c 'import torch'` fails as well"


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


def lookup_cure(distribution: str) -> str:
    """Say what to do about a registered name that nnU-Net doesn't find."""
    module = sys.modules.get("_nnunet_ext_hook")
    if module is None or not module.is_installed():
        return "repair the hook first, see there"
    return f"repair or uninstall {distribution}"


def collisions() -> Iterator[Finding]:
    """Find other distributions that install our top-level modules, and second copies on the path."""
    from packaging.utils import canonicalize_name

    others = {
        _label(distribution)
        for distribution in distributions()
        if _installs_our_modules(distribution) and canonicalize_name(_label(distribution).split()[0]) != DISTRIBUTION
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


def _label(distribution: Distribution) -> str:
    """Name and version, or the folder of the metadata where they can't be read."""
    try:
        name, number = distribution.metadata["Name"], distribution.version
    except Exception:
        name = number = ""
    return f"{name} {number}" if name else str(getattr(distribution, "_path", "an unnamed distribution"))


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


def device() -> Iterator[Finding]:
    """Run a small computation on the GPU, and compile one where nnU-Net would."""
    import torch

    if not torch.cuda.is_available():
        if torch.backends.mps.is_available():
            yield ok("device", "no CUDA, but MPS: train with -device mps")
            return
        build = f"this build of torch is for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        cure = "install a driver and a build of torch that fit, see pytorch.org; or train with -device cpu"
        yield warning("CUDA", f"isn't available ({build})", cure)
        yield ok("torch.compile", "not used: nnU-Net compiles on CUDA only")
        return
    try:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.ones(8, device="cuda").sum().item()
        yield ok("CUDA", f"{torch.version.cuda}, {torch.cuda.get_device_name(0)}, {memory:.0f} GB")
    except Exception as error:
        yield failure("CUDA", typed_line(error), "install a build of torch that fits GPU and driver")
        return
    yield _compilation()


def _compilation() -> Finding:
    import torch

    asked = os.environ.get(COMPILE)
    if os.name == "nt" or (asked is not None and asked.lower() not in ("true", "1", "t")):
        return ok("torch.compile", "not used on Windows" if os.name == "nt" else f"not used: {COMPILE}={asked}")
    cure = f"repair it, or train without: export {COMPILE}=f"
    if importlib.util.find_spec("triton") is None:
        return failure("torch.compile", "triton isn't installed", f"pip install triton, or export {COMPILE}=f")
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device="cuda"))
    except Exception as error:
        return failure("torch.compile", typed_line(error), cure)
    return ok("torch.compile", "compiles on this GPU")
