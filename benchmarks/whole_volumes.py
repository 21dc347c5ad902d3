"""Training steps on real data at the largest patch that `advise` finds for a card, with each way to save memory.

nnUNet_preprocessed=... python benchmarks/whole_volumes.py -d 15 --gpu 8 11 24 --output docs/benchmarks/DATE-brains

For a data set with plans and preprocessed 3d_fullres. Each row is a process of its own: nnU-Net's planner command, then
steps of nnU-Net's own training on its batches. On CUDA the peak is that of PyTorch's allocator; on the CPU, in bfloat16
autocast, that of the process over what it had before the first step. What is measured already is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.learning import PLACES, dataset_folder
from nnunet_ext import cli
from nnunet_ext.console import arguments
from nnunet_ext.escaping import markdown_table
from nnunet_ext.memory.tracker import GIB

CONFIGURATION = "3d_fullres"
LEFT_OUT = ("Cascade", "HalfWidth", "FasterFusion")  # train two networks; save no memory of the same network
Row = dict[str, Any]


def advised(dataset: str, gpu: float) -> list[Row]:
    """Rows of `nnunet-ext advise` that fit the card, one of each trainer: its largest patch."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        cli.main(["advise", "-d", dataset, "--gpu", f"{gpu:g}", "--json"])
    best: dict[str, Row] = {}
    for row in json.loads(text.getvalue())["rows"]:  # best coverage first
        if row.get("fits") and row["is_plain"] and not any(part in row["trainer"] for part in LEFT_OUT):
            best.setdefault(row["trainer"], row)
    return list(best.values())


def plan(dataset: str, row: Row, gpu: float) -> str:
    """Name of plans of the row's planner for the card."""
    name = f"{row['plans']}_{gpu:g}G"
    if not (dataset_folder(dataset) / f"{name}.json").is_file():
        options = ["-gpu_memory_target", f"{gpu:g}", "-overwrite_plans_name", name]
        command = ["nnUNetv2_plan_experiment", "-d", dataset, "-pl", row["planner"], *options]
        subprocess.run(arguments(command, os.environ), check=True, stdout=subprocess.DEVNULL)
    return name


def steps(dataset: str, plans_name: str, trainer_name: str, device: str, number: int, output: Path) -> None:
    """Train so many steps; write losses, seconds and peak."""
    import torch
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as host

    from nnunet_ext.nnunet.trainers import trainer_class

    folder = dataset_folder(dataset)
    plans, content = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in (plans_name, "dataset"))
    with tempfile.TemporaryDirectory() as results, patch.object(host, "nnUNet_results", results):
        trainer = trainer_class(f"{trainer_name}_1epochs")(
            {**plans, "continue_training": False}, CONFIGURATION, 0, content, torch.device(device)
        )
        trainer.initialize()
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
        batches, _ = trainer.get_dataloaders()
        on_cuda = device == "cuda"
        autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
        found: dict[str, Any] = {"losses": [], "seconds": []}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with patch(f"{PLACES[0]}.dummy_context", autocast):
            for _ in range(number):
                batch = next(batches)
                start = time.perf_counter()
                found["losses"].append(float(trainer.train_step(batch)["loss"]))
                found["seconds"].append(time.perf_counter() - start)
                after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                found["measured_peak"] = torch.cuda.max_memory_allocated() if on_cuda else after - before
                output.write_text(json.dumps(found), encoding="utf-8")


def measured(args: argparse.Namespace, gpu: float, row: Row) -> Row:
    """The row with its steps, read where they were measured before."""
    path = args.output / "steps" / f"{row['trainer']}_{gpu:g}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        plans, partial = plan(args.dataset, row, gpu), path.with_suffix(".partial")
        what = (args.dataset, plans, row["trainer"], args.device, args.steps, partial)
        process = get_context("spawn").Process(target=steps, args=what)
        process.start()
        process.join()
        if process.exitcode:
            print(f"{row['trainer']}, {gpu:g} GB: failed ({process.exitcode})", flush=True)
            return {**row, "gpu": gpu, "exitcode": process.exitcode}
        partial.replace(path)
    return {**row, "gpu": gpu, **json.loads(path.read_text("utf-8"))}


def table(rows: list[Row]) -> str:
    """One line for each row."""
    lines = []
    for row in rows:
        patches = "x".join(map(str, row["patch"]))
        planned = [f"{row['gpu']:g}", f"`{row['trainer']}`", patches, row["batch"], f"{row['coverage']:.0%}"]
        if "losses" not in row:
            lines.append([*planned, f"{row['expected'] / GIB:.1f}", f"failed ({row['exitcode']})", "", ""])
            continue
        losses = ", ".join(f"{loss:.3f}" for loss in row["losses"])
        seconds = f"{min(row['seconds']):.1f}"
        lines.append([*planned, f"{row['expected'] / GIB:.1f}", f"{row['measured_peak'] / GIB:.1f}", seconds, losses])
    header = ["card [GB]", "trainer", "patch", "batch", "cover", "expected [GB]", "measured [GB]", "step [s]", "losses"]
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", required=True, help="its number")
    parser.add_argument("--gpu", type=float, nargs="+", default=[8.0, 11.0, 24.0], metavar="GB")
    parser.add_argument("--steps", type=int, default=2, help="of each row (2)")
    parser.add_argument("--device", default="cpu", choices=("cuda", "cpu"))
    parser.add_argument("--output", type=Path, required=True, help="folder of brains.md and brains.json")
    args = parser.parse_args()
    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112
    rows = []
    for gpu in args.gpu:
        for row in advised(args.dataset, gpu):
            rows.append(measured(args, gpu, row))
            (args.output / "brains.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            (args.output / "brains.md").write_text(table(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
