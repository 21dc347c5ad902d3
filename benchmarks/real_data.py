"""Trained models side by side: Dice of cross-validation and of unseen scans, memory and time of a training step.

python benchmarks/real_data.py --output docs/benchmarks --name hippocampus \
    --models RESULTS/nnUNetTrainer_4epochs_50iters__nnUNetPlans__3d_fullres RESULTS/nnUNetTrainerReversible_... \
    --predictions PREDICTED_BY_FIRST PREDICTED_BY_SECOND --references LABELS_OF_UNSEEN_SCANS

Models are result folders of nnU-Net, the first is the baseline; predictions are in the order of the models.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder_simple
from reversible import add_ratios, markdown, train_step

from nnunet_ext.memory.network import measure_step
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.nnunet.model_folder import ModelFolder
from nnunet_ext.nnunet.setting import Setting


def dice_row(model: Path, predictions: Path, references: Path, labels: dict[str, int], ending: str) -> dict[str, Any]:
    """Mean Dice per class over all validation cases of all folds, and over the unseen scans."""
    cases = [
        case
        for summary in sorted(model.glob("fold_*/validation/summary.json"))
        for case in json.loads(summary.read_text())["metric_per_case"]
    ]
    compute_metrics_on_folder_simple(str(references), str(predictions), list(labels.values()), num_processes=2)
    unseen = json.loads((predictions / "summary.json").read_text())
    row: dict[str, Any] = {"network": model.name.split("__")[0], "validation_cases": len(cases)}
    for name, label in labels.items():
        row[f"{name}, validation"] = float(np.nanmean([case["metrics"][str(label)]["Dice"] for case in cases]))
    row["unseen_cases"] = len(list(references.glob(f"*{ending}")))
    for name, label in labels.items():
        row[f"{name}, unseen"] = float(unseen["mean"][str(label)]["Dice"])
    return row


def setting_of(model: Path) -> tuple[str, Setting]:
    """The trainer of a result folder, and what its network is built from."""
    trainer, _, configuration = model.name.split("__")
    found = ModelFolder.read(model, "--models needs", "name a result folder of nnU-Net")
    return trainer, Setting(plans=found.plans, dataset=found.dataset, configuration=configuration)


def cost_rows(models: list[Path], repeats: int) -> list[dict[str, Any]]:
    rows, seconds, runs = {}, {model: [] for model in models}, {}
    for model in models:
        trainer, setting = setting_of(model)
        build, channels = setting.builder(trainer), setting.input_channels
        patch, batch = setting.patch_size, setting.batch_size
        memory = measure_step(build, channels, patch, batch)
        network = build().train()
        runs[model] = (network, torch.randn(batch, channels, *patch))
        rows[model] = {
            "network": trainer,
            "patch": "x".join(map(str, patch)),
            "batch": batch,
            "parameters": sum(p.numel() for p in network.parameters()),
            "held": memory.held / GIB,
            "peak": memory.peak / GIB,
        }
    for repeat in range(repeats + 1):
        for model, (network, x) in runs.items():
            elapsed = train_step(network, x)
            if repeat:  # the first round warms up
                seconds[model].append(elapsed)
    return [{**row, "seconds": median(seconds[model])} for model, row in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the data, for the names of the files")
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--predictions", type=Path, nargs="+", required=True)
    parser.add_argument("--references", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    _, setting = setting_of(options.models[0])
    labels = {name: label for name, label in setting.dataset["labels"].items() if label != 0}
    dice = [
        dice_row(model, predictions, options.references, labels, setting.dataset["file_ending"])
        for model, predictions in zip(options.models, options.predictions, strict=True)
    ]
    cost = cost_rows(options.models, options.repeats)
    baseline = cost[0]["network"]
    add_ratios(cost, ["parameters", "held", "peak", "seconds"], baseline)
    today = date.today().isoformat()
    result = {
        "date": today,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dice": dice,
        "cost": cost,
    }
    (options.output / f"{today}-{options.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    text = f"## Dice\n\n{markdown(dice)}\n\n## Training step (GB, float32; seconds, CPU)\n\n{markdown(cost)}\n"
    (options.output / f"{today}-{options.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
