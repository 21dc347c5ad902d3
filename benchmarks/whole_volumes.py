"""Training steps on real data at the patch that `advise` finds for a card, with each way to save memory.

nnUNet_preprocessed=... python benchmarks/whole_volumes.py -d 15 --gpu 8 11 24 --output docs/benchmarks/DATE-brains

For a data set with plans and preprocessed 3d_fullres. Each row is a process of its own: nnU-Net's planner command, then
steps of nnU-Net's own training on its batches; the same plans are trained once. On CUDA the peak is that of PyTorch's
allocator; on the CPU, in bfloat16 autocast, what the process takes in a step beyond what it has before. Rows that are
measured are left out by the next call, and on the CPU those that this machine has not the memory for.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.learning import autocast, dataset_folder
from nnunet_ext import cli
from nnunet_ext.console import arguments
from nnunet_ext.escaping import markdown_table
from nnunet_ext.files import write_text
from nnunet_ext.memory.tracker import GIB

CONFIGURATION = "3d_fullres"
SHARED_DATA = "nnUNetPlans_3d_fullres"  # that all of these planners' plans use
ROWS = (
    ("nnUNetTrainer", "ExperimentPlanner"),
    ("nnUNetTrainer", "CountedMemoryPlanner"),
    ("nnUNetTrainerHalfWidthBN", "HalfWidthPlanner"),
    ("nnUNetTrainerActivationCheckpointing", "ActivationCheckpointingPlanner"),
    ("nnUNetTrainerReversible", "ReversibleUNetPlanner"),
    ("nnUNetTrainerInvertible", "InvertibleUNetPlanner"),
    ("nnUNetTrainerPartiallyInvertible", "PartiallyInvertibleUNetPlanner"),
    ("nnUNetTrainerImplicit", "ImplicitUNetPlanner"),
    ("nnUNetTrainerMeUNet", "MeUNetPlanner"),
    ("nnUNetTrainerMeUNetOnePass", "MeUNetPlanner"),
    ("nnUNetTrainerMeCheckpointing", "MeUNetPlanner"),
    ("nnUNetTrainerMeReversible", "MeReversibleUNetPlanner"),
)
Row = dict[str, Any]


def advised(dataset: str, gpu: float) -> list[Row]:
    """Of `nnunet-ext advise` for the card, in the order of `ROWS`."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        cli.main(["advise", "-d", dataset, "--gpu", f"{gpu:g}", "--json"])
    found = {(row["trainer"], row["planner"]): {**row, "gpu": gpu} for row in json.loads(text.getvalue())["rows"]}
    return [found[pair] for pair in ROWS]


def plan(dataset: str, row: Row) -> str:
    """Name of plans of the row's planner for the card."""
    name = f"{row['plans']}_{row['gpu']:g}G"
    path = dataset_folder(dataset) / f"{name}.json"
    if not path.is_file():
        options = ["-gpu_memory_target", f"{row['gpu']:g}", "-overwrite_plans_name", name]
        command = ["nnUNetv2_plan_experiment", "-d", dataset, "-pl", row["planner"], *options]
        subprocess.run(arguments(command, os.environ), check=True, stdout=subprocess.DEVNULL)
        content = json.loads(path.read_text("utf-8"))
        content["configurations"][CONFIGURATION]["data_identifier"] = SHARED_DATA
        write_text(path, json.dumps(content, indent=4))
    return name


def steps(dataset: str, plans_name: str, row: Row, device: str, number: int, output: Path) -> None:
    """Train so many steps; write losses, seconds and peak."""
    with tempfile.TemporaryDirectory() as results:
        os.environ["nnUNet_results"] = results  # noqa: SIM112, before nnU-Net reads it
        import torch

        from nnunet_ext.nnunet.trainers import trainer_class

        folder = dataset_folder(dataset)
        plans, content = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in (plans_name, "dataset"))
        trainer = trainer_class(f"{row['trainer']}_1epochs")(
            {**plans, "continue_training": False}, CONFIGURATION, 0, content, torch.device(device)
        )
        trainer.initialize()
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
        batches, _ = trainer.get_dataloaders()
        found: Row = {"losses": [], "seconds": [], "peak": 0}
        with autocast("bfloat16" if device == "cpu" else "float32"):
            for _ in range(number):
                batch = next(batches)
                before = memory("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
                start = time.perf_counter()
                found["losses"].append(float(trainer.train_step(batch)["loss"]))
                found["seconds"].append(time.perf_counter() - start)
                peak = torch.cuda.max_memory_allocated() if device == "cuda" else memory("VmHWM") - before
                found["peak"] = max(found["peak"], peak)
        write_text(output, json.dumps(found))


def memory(name: str, file: str = "/proc/self/status") -> int:
    """Bytes that Linux gives under a name, of this process or of the machine."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path(file).read_text("utf-8"), flags=re.MULTILINE)
    if match is None:
        raise ValueError(f"{file} has no {name}")
    return 1024 * int(match[1])


def measured(args: argparse.Namespace, row: Row) -> Row:
    """The row with its steps, or with the reason why there are none."""
    if row["reason"] or not row["fits"]:
        return {**row, "none": "does not fit" if not row["reason"] else row["reason"]}
    patch = "x".join(map(str, row["patch"]))
    path = args.output / "steps" / f"{row['trainer']}_{row['planner']}_{patch}_{row['batch']}.json"
    if not path.is_file():
        if args.device == "cpu" and row["expected"] > (free := memory("MemAvailable", "/proc/meminfo")):
            return {**row, "none": f"this machine has {free / GIB:.0f} GB free"}
        path.parent.mkdir(parents=True, exist_ok=True)
        what = (args.dataset, plan(args.dataset, row), row, args.device, args.steps, path)
        process = get_context("spawn").Process(target=steps, args=what)
        process.start()
        process.join()
    return {**row, **(json.loads(path.read_text("utf-8")) if path.is_file() else {"none": "failed"})}


def table(rows: list[Row]) -> str:
    """One line for each row."""
    lines = []
    for row in rows:
        line = [f"{row['gpu']:g}", f"`{row['trainer']}`", f"`{row['planner']}`"]
        if row.get("patch"):
            line += ["x".join(map(str, row["patch"])), f"{row['coverage']:.0%}", f"{row['expected'] / GIB:.1f}"]
        line += [""] * (6 - len(line))
        if "none" in row:
            lines.append([*line, row["none"], "", ""])
            continue
        losses = ", ".join(f"{loss:.2f}" for loss in row["losses"])
        lines.append([*line, f"{row['peak'] / GIB:.1f}", f"{min(row['seconds']):.0f}", losses])
    header = ["card [GB]", "trainer", "planner", "patch", "cover", "expected [GB]", "step [GB]", "step [s]", "losses"]
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
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for gpu in args.gpu:
        for row in advised(args.dataset, gpu):
            rows.append(measured(args, row))
            write_text(args.output / "brains.json", json.dumps(rows, indent=1) + "\n")
            write_text(args.output / "brains.md", table(rows) + "\n")


if __name__ == "__main__":
    main()
