"""What the processes of the benchmarks do in tests, in the place of nnU-Net's training; imports little."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.learning import Training


def leaves(training: Training, log: Path) -> None:
    """In the place of nnU-Net: note the call and the threads, validate; "Fails" stops before, as a kill does."""
    with log.open("a") as file:
        file.write(f"{os.environ['OMP_NUM_THREADS']} {any(training.folder.glob('*.pth'))}\n")
    training.folder.mkdir(parents=True, exist_ok=True)
    (training.folder / "checkpoint_best.pth").touch()
    if "Fails" in training.trainer and not (log.parent / "mended").exists():
        os._exit(3)
    (training.folder / "validation").mkdir()
    (training.folder / "validation" / "summary.json").touch()


def sleeps(training: Training, log: Path) -> None:
    """In the place of a training that does not end."""
    log.write_text(str(os.getpid()))
    time.sleep(600)
