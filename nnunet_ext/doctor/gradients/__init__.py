"""Compares gradients with those of plain autograd on the user's own machine, in a fresh process of nnU-Net's Python.

PyTorch has had compiled backward passes of own making silently wrong. A wrong gradient raises nothing: training goes
on and ends worse. Whatever recomputes depends on this.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nnunet_ext import doctor
from nnunet_ext.doctor.finding import Finding, failure
from nnunet_ext.errors import UsageError

BACKENDS = ("aot_eager", "inductor")
_PROBE = (
    "import sys; sys.path[:] = filter(None, sys.path); from nnunet_ext.doctor.gradients import probe; "
    "probe.main(sys.argv[1], sys.argv[2])"
)


def examine(backend: str = BACKENDS[0]) -> list[Finding]:
    """Compare the gradients of every registered trainer that recomputes.

    Args:
        backend: Of `torch.compile`; "inductor" writes code, which takes minutes.

    Raises:
        UsageError: another backend.
    """
    if backend not in BACKENDS:
        raise UsageError(f"the backend must be one of {', '.join(BACKENDS)}, got {backend}: use {BACKENDS[0]}.")
    python, finding = doctor.interpreter(shutil.which(doctor.COMMAND))
    if finding.level == "failure":
        return [finding]
    return [finding, *_probe(python, backend)]


def _probe(python: Sequence[str], backend: str) -> list[Finding]:
    """Run the comparison in a fresh process; what ends it is the last finding."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "findings.jsonl")
        try:
            done = subprocess.run(
                [*python, "-c", _PROBE, str(result), backend],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # nnU-Net prints
                stderr=subprocess.PIPE,
                timeout=doctor.TIMEOUT,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            cure = "see whether `nnunet-ext doctor` finds the reason"
            return [*_read(result), failure("gradients", f"can't be compared: {error}", cure)]
        findings = _read(result)
        if done.returncode == 0:
            return findings
        return [*findings, doctor.no_result(python, done.returncode, done.stderr.decode("utf-8", errors="replace"))]


def _read(result: Path) -> list[Finding]:
    """Findings so far."""
    lines = result.read_text(encoding="utf-8").splitlines() if result.is_file() else []
    return [Finding(**json.loads(line)) for line in lines]
