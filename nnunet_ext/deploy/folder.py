"""What all shipped folders have in common: a name that is free, JSON files, checkpoints of weights, checksums."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.deploy.standalone.predict import CHECKSUMS, sha256
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT


def check_new(output: Path) -> None:
    """See that nothing is overwritten.

    Raises:
        UsageError: the folder exists.
    """
    if output.exists():
        raise UsageError(f"-o needs a folder that does not exist, got {output}: choose another, or delete it.")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(fold: Path, model: TrainedModel, network: nn.Module, trainer: str) -> int:
    """Write what nnU-Net's predictor reads, tensors and plain values only; return its bytes.

    Args:
        fold: Folder of the fold; it is made.
        model: Where configuration and axes of mirroring come from.
        network: Whose weights are written.
        trainer: Name of the trainer that builds it.
    """
    content = io.BytesIO()
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": trainer,
        "init_args": {"configuration": model.setting.configuration},
        "inference_allowed_mirroring_axes": model.mirroring_axes,
    }
    torch.save(checkpoint, content)
    fold.mkdir(exist_ok=True)
    # torch.save itself reports a full disk as RuntimeError.
    return (fold / FINAL_CHECKPOINT).write_bytes(content.getvalue())


def write_sums(folder: Path) -> None:
    """Checksums of all files, as `sha256sum -c SHA256SUMS` reads them."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256(folder / name)}  {name}\n" for name in names if name != CHECKSUMS]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def count(network: nn.Module) -> int:
    """Count the weights."""
    return sum(p.numel() for p in network.parameters())
