"""Proves that nnU-Net's own commands find every registered name; says what to repair where they don't.

All checks run in a fresh process of the interpreter that runs ``nnUNetv2_train`` (`nnunet_ext.doctor.probe`):
what this process has imported or patched proves nothing.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nnunet_ext import installation
from nnunet_ext.doctor.finding import Finding, failure, ok, warning

HOST = "nnunetv2"
COMMAND = "nnUNetv2_train"
TIMEOUT = 900.0  # seconds: importing torch from a busy network folder takes minutes
# Console commands don't have the current folder on their path, `python -c` has.
_PROBE = "import sys; sys.path[:] = filter(None, sys.path); from nnunet_ext.doctor import probe; probe.main()"


def examine() -> list[Finding]:
    """Run all checks."""
    python, finding = interpreter(shutil.which(COMMAND))
    if finding.level == "failure":
        return [finding]
    return [finding, *_probe(python)]


def interpreter(script: str | None) -> tuple[list[str], Finding]:
    """Return the command line of the interpreter that runs `script`, and what there is to say about it.

    Args:
        script: Path of the console script; None where it isn't on PATH.
    """
    own = [sys.executable]
    if script is None:
        cure = f"activate the environment that nnU-Net is installed in, or install it: pip install {HOST}"
        return own, warning("command", f"{COMMAND} isn't on PATH, checked {sys.executable} instead", cure)
    python = shebang(script)
    if not python:
        return own, ok("command", f"{script} doesn't say which Python it uses, checked {sys.executable}")
    if shutil.which(python[0]) is None:
        cure = f"reinstall nnU-Net in that environment: pip install --force-reinstall --no-deps {HOST}"
        return python, failure("command", f"{script} needs {python[0]}, which doesn't exist", cure)
    return python, ok("command", f"{script} runs {shlex.join(python)}")


def shebang(script: str) -> list[str]:
    """Return the Python command line in the first lines of a console script; empty where there is none."""
    with open(script, "rb") as file:
        head = file.read(4096).decode("utf-8", errors="replace").splitlines()
    if not head or not head[0].startswith("#!"):
        return []
    line = head[0][2:]
    # Installers write long paths and paths with spaces as: #!/bin/sh, then '''exec' "/path/python" "$0" "$@"
    if len(head) > 1 and head[1].startswith("'''exec' "):
        line = head[1].removeprefix("'''exec' ").partition('"$0"')[0]
    try:
        words = shlex.split(line)
    except ValueError:
        return []
    if words and os.path.basename(words[0]) == "env":
        words = words[1:]
    return words if words and re.match(r"(python|pypy)[\d.]*(\.exe)?$", os.path.basename(words[0])) else []


def _probe(python: Sequence[str]) -> list[Finding]:
    """Run the checks in fresh processes and read what they found.

    What ends or blocks the process, a class's import, PyTorch's or a GPU, is a finding; the next one leaves it out.
    """
    fatal: dict[str, str] = {}  # what was done last -> what that did to the process
    while True:
        with tempfile.TemporaryDirectory() as folder:
            result, asked = Path(folder, "findings.json"), Path(folder, "asked")
            try:
                done = subprocess.run(
                    [*python, "-c", _PROBE, str(result), str(asked), json.dumps(fatal)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # nnU-Net prints while it searches
                    stderr=subprocess.PIPE,
                    timeout=TIMEOUT,
                )
                fate = f"ends the process, status {done.returncode}"
                died = no_result(python, done.returncode, done.stderr.decode("utf-8", errors="replace"))
            except (OSError, subprocess.TimeoutExpired) as error:
                fate = f"takes longer than {TIMEOUT:g} s"
                died = failure("checks", f"can't be run: {error}", f"see whether {shlex.join(python)} starts")
            if result.is_file():
                return [Finding(**record) for record in json.loads(result.read_text(encoding="utf-8"))]
            subject = asked.read_text(encoding="utf-8") if asked.is_file() else ""
        if not subject or subject in fatal:
            return [died]
        fatal[subject] = fate


def no_result(python: Sequence[str], status: int, stderr: str) -> Finding:
    """Say what ended a process of checks, by the last line that it wrote."""
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    if re.search(r"No module named '?nnunet_ext", last):
        return failure(
            "nnunet-ext",
            f"isn't installed, or only an old one, for {python[0]}, which runs nnU-Net",
            f"{shlex.quote(python[0])} -m pip install {installation.origin()}",
        )
    return failure(
        "checks", f"the process ended with status {status}: {last}", f"{shlex.join(python)} -c 'import torch'"
    )
