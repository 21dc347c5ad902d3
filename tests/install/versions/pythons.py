"""Pythons of this machine, by version."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def python(name: str) -> Path | None:
    """Find a Python of this version: on PATH, then uv's, then pyenv's; None where there is none that runs."""
    roots = [os.environ.get("PYENV_ROOT", ""), output_of("pyenv", "root"), str(Path.home() / ".pyenv")]
    versions = [path for root in roots if root for path in sorted(Path(root, "versions").glob(f"{name}*"))]
    candidates = [
        shutil.which(f"python{name}"),
        output_of("uv", "python", "find", name),
        *(str(version / "bin" / "python") for version in versions),
    ]
    ask = "import sys; print(*sys.version_info[:2], sep='.')"
    # pyenv's shims are on PATH also where they refuse to run
    return next((Path(found) for found in candidates if found and output_of(found, "-c", ask) == name), None)


def output_of(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
