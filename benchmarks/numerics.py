"""Trains every network that recomputes beside default nnU-Net in low precision, and logs how its numbers do.

nnUNet_preprocessed=... python benchmarks/numerics.py -d 4 --precision float16 --output docs/benchmarks/DATE-numerics

nnU-Net's own training step and batches, on the CPU: where nnU-Net enters CUDA's autocast this enters the CPU's, with
nnU-Net's gradient scaler for float16. Convolutions take low precision and add up in float32, as tensor cores do.
Logged are every step's loss, norm of the gradients before they are clipped, and scale; at every 50th step the largest
activation, what a coupling loses on the way back (x1, x2 from its y1, y2), and what recomputation changes in the
gradients of the batch, against plain autograd of the same weights in the same precision.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as host
from torch import Tensor, nn

from benchmarks.mixed_precision import AddsUpInFloat32, add_setting, asked_setting
from nnunet_ext.architectures.reversible.coupling import AdditiveCoupling
from nnunet_ext.escaping import markdown_table
from nnunet_ext.memory.network import surrogate_loss
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.trainers.unwrapped import unwrapped
from nnunet_ext.trainers.value_range import largest_activations

TRAINERS = (
    "nnUNetTrainer",
    "nnUNetTrainerActivationCheckpointing",
    "nnUNetTrainerReversible",
    "nnUNetTrainerInvertibleNoVAE",
    "nnUNetTrainerInvertible",
    "nnUNetTrainerPartiallyInvertibleNoVAE",
    "nnUNetTrainerPartiallyInvertible",
    "nnUNetTrainerMeReversible",
)
EVERY = 50  # steps between looks
START_SCALE = 2.0**16  # of nnU-Net's gradient scaler
Look = dict[str, float]


@contextmanager
def precision(name: str) -> Iterator[None]:
    """nnU-Net's steps in the CPU's autocast of this dtype, where on CUDA they enter CUDA's."""
    autocast = lambda: torch.autocast("cpu", getattr(torch, name))  # noqa: E731
    with ExitStack() as stack:
        if name != "float32":
            stack.enter_context(patch.object(host, "dummy_context", autocast))
            stack.enter_context(AddsUpInFloat32())
        yield


@contextmanager
def gradient_norms() -> Iterator[list[float]]:
    """Norms before clipping, of each call of nnU-Net."""
    found: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_

    def noted(*arguments: Any) -> Tensor:
        norm = clip(*arguments)
        found.append(float(norm))
        return norm

    with patch.object(torch.nn.utils, "clip_grad_norm_", noted):
        yield found


@contextmanager
def reconstruction_errors() -> Iterator[list[float]]:
    """What each coupling loses on its way back, relative to its largest input."""
    found: list[float] = []
    forward = AdditiveCoupling.forward

    def noted(self: AdditiveCoupling, x1: Tensor, x2: Tensor, *rest: Any) -> Any:
        y1, y2 = forward(self, x1, x2, *rest)
        with torch.no_grad():
            back = self.inverse(y1, y2)
            largest = max(float(x.abs().max()) for x in (x1, x2))
            found.append(max(float((x - z).abs().max()) for x, z in zip((x1, x2), back, strict=True)) / largest)
        return y1, y2

    with patch.object(AdditiveCoupling, "forward", noted):
        yield found


def gradients(network: nn.Module, image: Tensor, name: str) -> Tensor:
    network.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # the latent of a VAE
    with torch.autocast("cpu", getattr(torch, name), enabled=name != "float32"):
        loss = surrogate_loss(network(image))
    (1024 * loss).backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in network.parameters()])


def look(network: nn.Module, image: Tensor, name: str) -> Look:
    """Largest activation, error of reconstruction, and what recomputation changes in the gradients."""
    low = getattr(torch, name)
    with torch.no_grad(), torch.autocast("cpu", low, enabled=name != "float32"):
        found: Look = {"activation": max(largest_activations(network, image, low).values(), default=0.0)}
    if not hasattr(network, "reversible"):
        return found
    recomputed = gradients(network, image, name)
    network.reversible = False  # plain autograd of the same weights
    with reconstruction_errors() as errors:
        plain = gradients(network, image, name)
    network.reversible = True
    network.zero_grad(set_to_none=True)
    found["reconstruction"] = max(errors, default=0.0)
    found["gradient"] = float((recomputed - plain).norm() / plain.norm())
    return found


def train(setting: Setting, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run the steps of a trainer; return what was logged."""
    plans = {**deepcopy(dict(setting.plans)), "continue_training": False}
    torch.manual_seed(0)
    trainer_type = trainer_class(f"{name}_1epochs")  # with a suffix nnU-Net's own gets what ours have
    trainer = trainer_type(plans, setting.configuration, 0, dict(setting.dataset), torch.device("cpu"))
    trainer.num_epochs = math.ceil(options.steps / 250)
    trainer.initialize()
    if options.precision == "float16":
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=START_SCALE)
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    batches, _ = trainer.get_dataloaders()
    log: dict[str, Any] = {"losses": [], "norms": [], "scales": [], "looks": []}
    start = time.perf_counter()
    with precision(options.precision), gradient_norms() as norms:
        for step in range(options.steps):
            trainer.current_epoch = step // 250
            if step % 250 == 0:
                trainer.on_train_epoch_start()
            batch = next(batches)
            norms.clear()
            log["losses"].append(float(trainer.train_step(batch)["loss"]))
            log["norms"].append(norms[-1])
            log["scales"].append(trainer.grad_scaler.get_scale() if trainer.grad_scaler else 1.0)
            if step % EVERY == EVERY - 1:
                log["looks"].append(look(unwrapped(trainer.network), batch["data"][:1], options.precision))
                print(
                    f"{name}: step {step + 1}, loss {mean(log['losses'][-EVERY:]):.4f}, {log['looks'][-1]}", flush=True
                )
    log["seconds"] = (time.perf_counter() - start) / options.steps
    return log


def row(name: str, log: dict[str, Any]) -> list[str]:
    losses, norms, looks = log["losses"], [x for x in log["norms"] if math.isfinite(x)], log["looks"]
    scales = [START_SCALE, *log["scales"]]
    skipped = sum(b < a for a, b in pairwise(scales)) if scales[-1] != 1 else 0

    def largest(key: str, form: str) -> str:
        values = [found[key] for found in looks if key in found]
        return f"{max(values):{form}}" if values else ""

    return [
        name,
        f"{mean(losses[-EVERY:]):.3f}",
        str(sum(not math.isfinite(x) for x in losses)),
        f"{skipped}",
        f"{scales[-1]:g}" if scales[-1] != 1 else "",
        f"{sorted(norms)[len(norms) // 2]:.2g}",
        f"{max(norms):.2g}",
        largest("activation", ".3g"),
        largest("reconstruction", ".1e"),
        largest("gradient", ".1e"),
    ]


COLUMNS = [
    "trainer",
    f"loss, last {EVERY} steps",
    "losses not finite",
    "steps left out",
    "last scale",
    "median gradient norm",
    "largest",
    "largest activation",
    "reconstruction error",
    "error of gradients",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser, features=8)
    parser.add_argument("--precision", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS))
    options = parser.parse_args()

    setting = asked_setting(options)
    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{options.precision}.json"
    logs: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}  # goes on where it was stopped
    with tempfile.TemporaryDirectory() as results:
        os.environ["nnUNet_results"] = results  # noqa: SIM112
        for name in options.trainers:
            if name not in logs:
                logs[name] = train(setting, name, options)
                path.write_text(json.dumps(logs) + "\n")
    table = markdown_table(COLUMNS, [row(name, log) for name, log in logs.items()])
    heading = f"`python benchmarks/numerics.py {' '.join(sys.argv[1:])}`, PyTorch {torch.__version__}, CPU"
    (options.output / f"{options.precision}.md").write_text(f"{heading}\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
