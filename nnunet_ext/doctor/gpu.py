"""Checks of the GPU: whether there is one, whether it computes, whether nnU-Net's compilation works on it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from nnunet_ext.doctor.finding import Finding, failure, ok, warning
from nnunet_ext.printable import printable, typed_line

COMPILE = "nnUNet_compile"
VISIBLE = "CUDA_VISIBLE_DEVICES"
NODES, PCI = Path("/dev"), Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # vendor, and the beginning of the class of graphics cards
_SECONDS = 20.0  # for nvidia-smi, which hangs where the driver does


def device(fate: str = "") -> Iterator[Finding]:
    """Run a small computation on every GPU, and compile one where nnU-Net would.

    Args:
        fate: What became of an earlier process that did so; empty where none ended.
    """
    if fate:
        yield failure("CUDA", fate, "repair the driver until nvidia-smi and a torch.ones(1, device='cuda') work")
        return
    import torch

    if torch.cuda.is_available():
        yield from _computing()
        return
    if torch.backends.mps.is_available():
        yield ok("device", "no CUDA, but MPS: train with -device mps")
        return
    yield _unavailable(signs())
    yield ok("torch.compile", "not used: nnU-Net compiles on CUDA only")


def signs() -> list[str]:
    """What tells that this machine has a GPU of NVIDIA, without PyTorch: device nodes, PCI bus, nvidia-smi."""
    found = [str(node) for node in sorted(NODES.glob("nvidia[0-9]*"))]
    for card in sorted(PCI.glob("*")):
        if _read(card / "vendor") == _NVIDIA and _read(card / "class").startswith(_DISPLAY):
            found.append(f"PCI {card.name}")
    command = shutil.which("nvidia-smi")
    return [*found, f"nvidia-smi: {_said(command)}"] if command else found


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _said(command: str) -> str:
    """First line of what nvidia-smi lists, or of why it does not."""
    try:
        done = subprocess.run([command, "-L"], capture_output=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return typed_line(error)
    lines = (done.stdout + done.stderr).decode("utf-8", errors="replace").split("\n")
    return printable(next((line.strip() for line in lines if line.strip()), f"status {done.returncode}"))


def _unavailable(found: list[str]) -> Finding:
    """PyTorch finds no GPU: a failure where the machine has one that is not hidden on purpose."""
    import torch

    built = torch.version.cuda
    build = f"this build of torch is for CUDA {built}" if built else "a CPU build of torch"
    cure = "install a driver and a build of torch that fit, see pytorch.org; or train with -device cpu"
    visible = os.environ.get(VISIBLE)
    if visible is not None and (not visible.strip() or visible.strip().startswith("-")):
        return warning("CUDA", f"isn't available: {VISIBLE}={visible} hides GPUs", f"unset {VISIBLE}")
    if not found:
        return warning("CUDA", f"isn't available ({build})", cure)
    what = "repair the driver until nvidia-smi lists the GPU" if built else "install a build of torch for CUDA"
    cure = f"{what}, in a container pass the GPU on; where none is meant to be used: export {VISIBLE}="
    return failure("CUDA", f"isn't available ({_reason()}; {build}), but a GPU is there: {', '.join(found)}", cure)


def _reason() -> str:
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return typed_line(error)
    return f"{torch.cuda.device_count()} devices"


def _computing() -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count()):
        try:
            name = torch.cuda.get_device_name(index)
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            torch.ones(8, device=f"cuda:{index}").sum().item()
        except Exception as error:
            detail = f"GPU {index}: {typed_line(error)}"
            yield failure("CUDA", detail, "repair its driver, or install a build of torch that fits GPU and driver")
            return
        yield ok("CUDA", f"{torch.version.cuda}, {name}, {memory:.0f} GB")
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
