"""Packs what `nnunet-ext compare` reads of trained folds, without weights, segmentations and paths of this machine.

python benchmarks/keep_results.py RESULTS/DATASET FILE.tar.xz
tar xf FILE.tar.xz -C RESULTS    # elsewhere: `compare` compares them, benchmarks/learning.py leaves them out
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch

from nnunet_ext.files import read_json
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT, read_checkpoint

SUMMARY = "validation/summary.json"
DEBUG = ("device", "gpu_name", "torch_version", "num_epochs", "num_iterations_per_epoch", "batchgeneratorsv2_version")
WEIGHTS = ("network_weights", "optimizer_state", "grad_scaler_state")


def kept(model: Path) -> Iterator[tuple[str, bytes]]:
    """Names of files of a result folder and what is kept of them; nothing where no fold is validated."""
    folds = sorted(path.parents[1] for path in model.glob(f"fold_*/{SUMMARY}"))
    for name in ("plans.json", "dataset.json") if folds else ():
        yield f"{model.name}/{name}", (model / name).read_bytes()
    for fold in folds:
        debug = read_json(fold / "debug.json", "train the fold again")
        summary = read_json(fold / SUMMARY, "validate the fold again")
        for case in summary["metric_per_case"]:
            case |= {key: Path(case[key]).name for key in ("prediction_file", "reference_file")}
        checkpoint = io.BytesIO()
        log = read_checkpoint(fold / FINAL_CHECKPOINT, "train the fold again")
        torch.save({key: value for key, value in log.items() if key not in WEIGHTS}, checkpoint)
        files = {
            "debug.json": json.dumps({key: debug[key] for key in DEBUG if key in debug}).encode(),
            SUMMARY: json.dumps(summary).encode(),
            FINAL_CHECKPOINT: checkpoint.getvalue(),
        }
        if (note := fold / "learning.json").is_file():
            files[note.name] = note.read_bytes()
        yield from ((f"{model.name}/{fold.name}/{name}", content) for name, content in files.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a data set in nnUNet_results")
    parser.add_argument("file", type=Path, help="archive to write, .tar.xz")
    options = parser.parse_args()
    with tarfile.open(options.file, "w:xz") as archive:
        for model in sorted(options.folder.glob("*__*__*")):
            for name, content in kept(model):
                entry = tarfile.TarInfo(f"{options.folder.name}/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    main()
