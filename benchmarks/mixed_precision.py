"""Trains networks that recompute, and the same without, on the same batches of real data in bfloat16 autocast.

nnUNet_preprocessed=... python benchmarks/mixed_precision.py -d 4 --output docs/benchmarks/DATE-mixed-precision

On the CPU, where nnU-Net itself uses no autocast. Pairs start from the same weights; backward runs outside of autocast,
as in nnU-Net. Without recomputation streams stay float32 and plain autograd keeps them. Convolutions take bfloat16 and
add up in float32, as tensor cores do: most CPUs are twenty times slower at adding up in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from nnunet_ext.escaping import markdown_table
from nnunet_ext.nnunet.patch_plans import narrow
from nnunet_ext.nnunet.setting import Setting

# Rows of pairs: trainer, and arguments that its plans get.
PAIRS = {
    "ReversibleUNet": (("nnUNetTrainerReversible", {}), ("nnUNetTrainerReversible", {"reversible": False})),
    "InvertibleUNet": (("nnUNetTrainerInvertibleNoVAE", {}), ("nnUNetTrainerInvertibleNoVAE", {"reversible": False})),
    "activation checkpointing": (("nnUNetTrainerActivationCheckpointing", {}), ("nnUNetTrainer", {})),
}
WINDOW = 50  # steps of a mean

Batch = dict[str, Any]


class AddsUpInFloat32(TorchDispatchMode):
    """Convolutions of low precision as tensor cores compute them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" not in func.__name__:
            return func(*args, **(kwargs or {}))
        low = next(x.dtype for x in args if isinstance(x, Tensor))
        result = func(*tree_map_only(Tensor, Tensor.float, args), **(kwargs or {}))
        return tree_map_only(Tensor, lambda x: x.to(low), result)


def host(setting: Setting) -> nnUNetTrainer:
    """nnU-Net's trainer, for its batches, loss and optimiser."""
    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112
    plans = {**setting.plans, "continue_training": False}
    trainer = nnUNetTrainer(plans, setting.configuration, 0, dict(setting.dataset), torch.device("cpu"))
    trainer.initialize()
    return trainer


def batches(trainer: nnUNetTrainer, steps: int, validation: int) -> tuple[list[Batch], list[Batch]]:
    """Augmented batches of fold 0, and those of its validation cases."""
    training, held_out = trainer.get_dataloaders()
    return [next(training) for _ in range(steps)], [next(held_out) for _ in range(validation)]


def network_of(setting: Setting, trainer: str, arguments: dict[str, Any]) -> torch.nn.Module:
    """The trainer's network; pairs start alike."""
    plans = deepcopy(dict(setting.plans))
    plans["configurations"][setting.configuration]["architecture"]["arch_kwargs"] |= arguments
    torch.manual_seed(0)
    return replace(setting, plans=plans).builder(trainer)()


def train(trainer: nnUNetTrainer, network: torch.nn.Module, training: Sequence[Batch]) -> Iterator[float]:
    """Yield the loss of every step of nnU-Net's training, in bfloat16 autocast."""
    trainer.network = network.train()
    optimizer, _ = trainer.configure_optimizers()
    scheduler = PolyLRScheduler(optimizer, trainer.initial_lr, len(training))
    for step, batch in enumerate(training):
        scheduler.step(step)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = trainer.loss(network(batch["data"]), batch["target"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def dice(network: torch.nn.Module, held_out: Sequence[Batch]) -> float:
    """Mean foreground Dice over all voxels of the validation patches."""
    counts = []
    for batch in held_out:
        with torch.autocast("cpu", torch.bfloat16):
            logits = network.eval()(batch["data"])
        logits = logits[0] if isinstance(logits, (list, tuple)) else logits
        predicted = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, logits.argmax(1, keepdim=True), 1)
        counts.append(torch.stack(get_tp_fp_fn_tn(predicted, batch["target"][0], axes=[0, 2, 3, 4])[:3]))
    tp, fp, fn = torch.stack(counts).sum(0)[:, 1:]
    return float((2 * tp / (2 * tp + fp + fn)).mean())


def smoothed(losses: Sequence[float]) -> list[float]:
    return [mean(losses[i : i + WINDOW]) for i in range(0, len(losses), WINDOW)]


def figure(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    drawing = Figure(figsize=(4 * len(curves), 3), layout="constrained")
    for axes, (name, pair) in zip(drawing.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for (label, losses), style in zip(pair.items(), ("-", "--"), strict=True):
            means = smoothed(losses)
            axes.plot([WINDOW * (i + 0.5) for i in range(len(means))], means, style, label=label)
        axes.set(title=name, xlabel="step", ylabel=f"loss, mean of {WINDOW} steps")
        axes.legend(frameon=False)
    drawing.savefig(path, dpi=120)


def add_setting(parser: argparse.ArgumentParser, features: int) -> None:
    """Add the options that `asked_setting` reads."""
    parser.add_argument("-d", "--dataset", required=True)
    parser.add_argument("-c", "--configuration", default="3d_fullres")
    parser.add_argument("-p", "--plans", default="nnUNetPlans")
    parser.add_argument("--features", type=int, default=features, help="of the finest stage; doubled per stage")
    parser.add_argument("--batch", type=int, help="default: that of the plans")
    parser.add_argument("--patch", type=int, nargs="+", help="default: that of the plans")


def asked_setting(options: argparse.Namespace) -> Setting:
    """Plans of a preprocessed data set, with the features, batch and patch that are asked for."""
    folder = Path(nnUNet_preprocessed, maybe_convert_to_dataset_name(options.dataset))
    plans = json.loads((folder / f"{options.plans}.json").read_text())
    asked = {"batch_size": options.batch, "patch_size": options.patch}
    plans["configurations"][options.configuration] |= {key: value for key, value in asked.items() if value}
    setting = Setting(
        plans=plans, dataset=json.loads((folder / "dataset.json").read_text()), configuration=options.configuration
    )
    return narrow(setting, [options.features * 2**i for i in range(9)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser, features=16)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--validation", type=int, default=40, help="batches of the validation cases")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    options = parser.parse_args()

    setting = asked_setting(options)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as results, AddsUpInFloat32():
        os.environ["nnUNet_results"] = results  # noqa: SIM112
        torch.manual_seed(0)
        trainer = host(setting)
        training, held_out = batches(trainer, options.steps, options.validation)
        print(f"{len(training)} batches of {tuple(training[0]['data'].shape)}", flush=True)
        result: dict[str, Any] = {"steps": options.steps, "features": options.features, "torch": torch.__version__}
        curves: dict[str, dict[str, list[float]]] = result.setdefault("losses", {})
        rows = []
        for name in options.pairs:
            found = {}
            for label, (trained, arguments) in zip(("recomputed", "plain autograd"), PAIRS[name], strict=True):
                network, start = network_of(setting, trained, arguments), time.perf_counter()
                losses = []
                for loss in train(trainer, network, training):
                    losses.append(loss)
                    if len(losses) % WINDOW == 0:
                        print(f"{name}, {label}: step {len(losses)}, loss {mean(losses[-WINDOW:]):.4f}", flush=True)
                found[label] = losses
                seconds = (time.perf_counter() - start) / options.steps
                rows.append([name, label, *(f"{x:.3f}" for x in smoothed(losses)), f"{dice(network, held_out):.3f}"])
                print(f"{name}, {label}: Dice {rows[-1][-1]}, {seconds:.2f} s per step", flush=True)
            curves[name] = found
            apart = max(abs(a - b) for a, b in zip(*map(smoothed, found.values()), strict=True))
            rows.append([name, "largest difference", f"{apart:.3f}", *[""] * (len(rows[-1]) - 3)])
            ends = [f"loss, steps to {i + WINDOW}" for i in range(0, options.steps, WINDOW)]
            table = markdown_table(["network", "gradients by", *ends, "Dice"], rows)
            heading = f"`python benchmarks/mixed_precision.py {' '.join(sys.argv[1:])}`: bfloat16 autocast, CPU"
            (options.output / "mixed_precision.md").write_text(f"{heading}\n\n{table}\n")
            (options.output / "mixed_precision.json").write_text(json.dumps({**result, "rows": rows}) + "\n")
            figure(curves, options.output / "mixed_precision.png")


if __name__ == "__main__":
    main()
