"""Counts what activation checkpointing needs beside the default trainer, on plans of nnU-Net's own planners.

    python -m benchmarks.checkpointing --output docs/benchmarks/2026-11-27-checkpointing

Memory is counted on shapes, float16 autocast (docs/reference/memory.md): no GPU, the same figures everywhere. Data
sets are fingerprints alone; they and nnU-Net's plans lie in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

PLANNERS = {
    "ExperimentPlanner": "default",
    "nnUNetPlannerResEncM": "ResEnc M",
    "nnUNetPlannerResEncL": "ResEnc L",
    "nnUNetPlannerResEncXL": "ResEnc XL",
}
TRAINERS = ("nnUNetTrainer", "nnUNetTrainerActivationCheckpointing")
DATA_SETS = ("ct", "4 channels", "mri", "2d")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Plans of one data set, trained by both; GB are 2**30 bytes."""

    plans: str
    data_set: str
    configuration: str
    patch: list[int]
    batch: int
    held: list[float]
    peak: list[float]
    expected: list[float]

    @property
    def markdown(self) -> str:
        """Line of the table."""
        pairs = [f"{a:.2f} -> {b:.2f} ({b / a:.2f}x)" for a, b in (self.held, self.peak, self.expected)]
        patch = "x".join(map(str, self.patch))
        return f"| {self.plans} | {self.data_set} | {patch}, {self.batch} | {' | '.join(pairs)} |"


def main() -> None:
    """Count, print, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        rows = count(Path(folder))
    print()
    head = "| plans | data set | patch, batch | held | peak | expected |\n|---|---|---|---|---|---|"
    table = "\n".join([head, *(row.markdown for row in rows)])
    print(table)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "memory.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        said = "GB (2**30 bytes), float16 autocast, default trainer -> `nnUNetTrainerActivationCheckpointing`."
        (output / "memory.md").write_text(f"# Activation checkpointing, counted\n\n{said}\n\n{table}\n")


def count(folder: Path) -> list[Row]:
    """Plan every data set with every planner and count both trainers."""
    os.environ |= {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments

    from benchmarks.planners import FINGERPRINTS, write_dataset
    from nnunet_ext.memory.count import count_memory
    from nnunet_ext.memory.tracker import GIB
    from nnunet_ext.nnunet.setting import Setting

    rows = []
    for number, key in enumerate(DATA_SETS, start=1):
        write_dataset(folder, number, FINGERPRINTS[key])
        for planner, title in PLANNERS.items():
            with torch.device("meta"):  # sizes are enough
                plan_experiments([number], experiment_planner_class_name=planner)
            name = f"Dataset{number:03d}_planned"
            written = max(
                (folder / "preprocessed" / name).glob("*Plans.json"), key=lambda file: file.stat().st_mtime_ns
            )
            plans, dataset = (json.loads(f.read_text()) for f in (written, folder / "raw" / name / "dataset.json"))
            configuration = "2d" if key == "2d" else "3d_fullres"
            setting = Setting(plans=plans, dataset=dataset, configuration=configuration)
            memories = [count_memory(setting, trainer, setting.batch_size) for trainer in TRAINERS]
            row = Row(
                plans=title,
                data_set=key,
                configuration=configuration,
                patch=list(setting.patch_size),
                batch=setting.batch_size,
                held=[round(m.held / GIB, 3) for m in memories],
                peak=[round(m.peak / GIB, 3) for m in memories],
                expected=[round(m.expected / GIB, 3) for m in memories],
            )
            print(row.markdown, flush=True)
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
