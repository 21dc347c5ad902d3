"""nnU-Net's console commands in this process: each one of its own would import PyTorch again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from nnunet_ext import launch
from tests.contract.threads import threads_for_processes

CURVES = "nnunetv2.training.logging.nnunet_logger.MetaLogger.plot_progress_png"


@contextmanager
def nnunet_folders(folder: Path) -> Iterator[None]:
    """nnU-Net's three folders below this one; before nnU-Net 2.8 entered before it is imported."""
    own = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    own |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "false"}
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with patch.dict(os.environ, own):
        yield


def run(log: Path, command: str, *arguments: str | int | Path) -> None:
    """Run a command with its own parsing; what it prints is appended to the log.

    Pools are threads, nnU-Net's curves are not drawn, and PyTorch keeps the number of threads that it has: these
    networks wait for threads longer than they compute.
    """
    line = [command, *map(str, arguments)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("a", encoding="utf-8") as stream,
        redirect_stdout(stream),
        redirect_stderr(stream),
        patch.object(sys, "argv", line),
        patch(CURVES),
        patch("torch.set_num_threads"),
        threads_for_processes(),
    ):
        print("\n$", " ".join(line), flush=True)
        launch.find(command).load()()
