"""Losses of variants of a network, or of its optimiser, on the same batches: what makes it learn more slowly?

python benchmarks/slow_learning.py half_width -d 4 -p nnUNetPlans_batch2 --steps 360 --seed 1 --constant
python benchmarks/slow_learning.py reversible -d 950 -p nnUNetMeCascadePlansLarge --steps 2400

nnUNet_preprocessed has the data set, the second time the phantom of benchmarks/context.py. nnU-Net's own steps on
fold 0, on the CPU in bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from benchmarks.learning import autocast, dataset_folder, start_anew
from nnunet_ext.architectures.reversible.coupling import AdditiveCoupling
from nnunet_ext.architectures.reversible.transitions import Join
from nnunet_ext.escaping import markdown_table
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.trainers.adamw import AdamWMixin
from nnunet_ext.trainers.unwrapped import unwrapped

PARTS = 6  # of the steps, each a column


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A trainer, arguments that its plans get, what is done to its network before the first step, an optimiser.

    Args:
        adamw: AdamW as `AdamWMixin` has it, or nnU-Net's SGD, whatever the trainer takes.
        rate: Its learning rate; None: 0.001, of SGD 0.01.
    """

    method: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], None] = lambda network: None
    adamw: bool = False
    rate: float | None = None

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """That of all parameters."""
        weights = network.parameters()
        if self.adamw:
            rate, decay = self.rate or AdamWMixin.learning_rate, AdamWMixin.adamw_weight_decay
            return torch.optim.AdamW(weights, rate, weight_decay=decay)
        return torch.optim.SGD(weights, self.rate or 0.01, weight_decay=3e-5, momentum=0.99, nesterov=True)


def normalise_images(network: nn.Module) -> None:
    """Normalise each image again, after augmentation."""
    network.register_forward_pre_hook(lambda _, images: (nn.functional.instance_norm(images[0]),))


def instance_norms(wanted: Callable[[int, nn.Module], bool]) -> Callable[[nn.Module], None]:
    """Instance norm in place of those batch norms, by number and module, in the order in which they stand."""

    def change(network: nn.Module) -> None:
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm3d)]
        swapped = {
            id(norm): nn.InstanceNorm3d(norm.num_features, eps=norm.eps, affine=True)
            for number, norm in enumerate(norms)
            if wanted(number, norm)
        }
        for module in list(network.modules()):
            for name, child in list(module._modules.items()):
                module._modules[name] = swapped.get(id(child), child)

    return change


def with_norms(*lists: nn.ModuleList) -> None:
    """Norm and nonlinearity before these layers."""
    for layers in lists:
        for number, layer in enumerate(list(layers)):
            if layer.in_channels > 1:
                norm = nn.InstanceNorm3d(layer.in_channels, affine=True)
                layers[number] = nn.Sequential(norm, nn.LeakyReLU(), layer)


def norm_after(layer: Any) -> nn.Module:
    """Norm and nonlinearity of what a layer gives."""
    return nn.Sequential(nn.InstanceNorm3d(layer.out_channels, affine=True), nn.LeakyReLU())


def norms_after_transitions(network: Any) -> None:
    """Norm and nonlinearity after the first convolution and each transition, before the skip is added."""
    transitions = [*network.encoder.transitions, *network.decoder.transitions]
    network.after = nn.ModuleList(norm_after(one) for one in transitions)
    for one, after in zip(transitions, network.after, strict=True):
        one.register_forward_hook(lambda _, __, y, after=after: after(y))


class Concatenated(nn.Module):
    """The way up, concatenation with the skip, convolution, norm and nonlinearity."""

    def __init__(self, way: Any) -> None:
        super().__init__()
        self.way = way
        self.convolution = nn.Conv3d(2 * way.out_channels, way.out_channels, 3, padding=1)
        self.after = norm_after(way)
        InitWeights_He(1e-2)(self.convolution)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Join both levels."""
        joined: Tensor = self.after(self.convolution(torch.cat([self.way(x), skip], dim=1)))
        return joined


def concatenate(network: Any) -> None:
    """Concatenate the skips instead of adding them."""
    network.decoder.joins = Join
    network.decoder.transitions = nn.ModuleList(map(Concatenated, network.decoder.transitions))


@torch.no_grad()
def start_small(network: Any) -> None:
    """F and G zero, heads a tenth of what they are."""
    for coupling in network.modules():
        if isinstance(coupling, AdditiveCoupling):
            for shift in (coupling.f, coupling.g):
                convolution = [m for m in shift.modules() if isinstance(m, nn.Conv3d)][-1]
                for parameter in convolution.parameters():
                    parameter.zero_()
    for head in network.decoder.seg_layers:
        head.weight.mul_(0.1)


VARIANTS = {
    "half_width": {
        "instance norm": Variant(method="HalfWidth"),
        "batch norm": Variant(method="HalfWidthBN"),
        "images normalised": Variant(method="HalfWidthBN", change=normalise_images),
        "first norm instance norm": Variant(method="HalfWidthBN", change=instance_norms(lambda number, _: number == 0)),
        "instance norm from 64 features on": Variant(
            method="HalfWidthBN", change=instance_norms(lambda _, norm: norm.num_features >= 64)
        ),
        "instance norm, AdamW": Variant(method="HalfWidth", adamw=True),
        "batch norm, AdamW": Variant(method="HalfWidthBN", adamw=True),
        "invertible": Variant(method="InvertibleNoVAE"),
        "invertible, AdamW": Variant(method="InvertibleNoVAE", adamw=True),
    },
    "reversible": {
        "default": Variant(),
        "half width": Variant(method="HalfWidth"),
        "reversible": Variant(method="Reversible"),
        "nnU-Net's order": Variant(method="Reversible", arguments={"preactivation": False}),
        "twice as wide": Variant(method="Reversible", arguments={"features_per_stage": [16, 32, 64]}),
        "norms before heads": Variant(method="Reversible", change=lambda n: with_norms(n.decoder.seg_layers)),
        "norms before heads and transitions": Variant(
            method="Reversible",
            change=lambda n: with_norms(n.decoder.seg_layers, n.encoder.transitions, n.decoder.transitions),
        ),
        "small start": Variant(method="Reversible", change=start_small),
        "small start, 0.003": Variant(method="Reversible", change=start_small, rate=0.003),
        "small start, 0.03": Variant(method="Reversible", change=start_small, rate=0.03),
        "norms after transitions": Variant(method="Reversible", change=norms_after_transitions),
        "skips concatenated": Variant(method="Reversible", change=concatenate),
        "partially invertible": Variant(method="PartiallyInvertibleNoVAE"),
        "invertible": Variant(method="InvertibleNoVAE"),
        "invertible, AdamW": Variant(method="InvertibleNoVAE", adamw=True),
        "AdamW": Variant(method="Reversible", adamw=True),
        "AdamW, small start": Variant(method="Reversible", change=start_small, adamw=True),
        "default, AdamW": Variant(adamw=True),
    },
}


def losses(variant: Variant, options: argparse.Namespace, batches: list[dict[str, Any]]) -> list[float]:
    """Of each step; batches are drawn where there are none yet."""
    start_anew(options.seed)
    folder = dataset_folder(options.dataset)
    plans, dataset = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in (options.plans, "dataset"))
    plans = deepcopy(plans) | {"continue_training": False}
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= variant.arguments
    schedule = "_1epochs" + ("_NoMirroring" if options.experiment == "reversible" else "")
    trainer = trainer_class(f"nnUNetTrainer{variant.method}{schedule}")(
        plans, "3d_fullres", 0, dataset, torch.device("cpu")
    )
    trainer.initialize()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    network: Any = unwrapped(trainer.network)
    variant.change(network)
    if hasattr(network, "reversible"):
        network.reversible = False  # the same gradients, whatever was put in
    trainer.optimizer = variant.optimizer(network)
    rate = trainer.optimizer.param_groups[0]["lr"]
    if not batches:
        start_anew(options.seed)  # the same ones, whichever variant draws them
        training, _ = trainer.get_dataloaders()
        batches += [next(training) for _ in range(options.steps)]
    found = []
    with autocast("bfloat16"):
        for step, batch in enumerate(batches):
            left = 1.0 if options.constant else (1 - step / len(batches)) ** 0.9
            trainer.optimizer.param_groups[0]["lr"] = rate * left
            found.append(float(trainer.train_step(batch)["loss"]))
    return found


def cells(name: str, found: list[float]) -> Iterable[str]:
    """Loss of the first step, then means of equal parts."""
    size = len(found) // PARTS
    return [name, f"{found[0]:.2f}", *(f"{mean(found[i * size : (i + 1) * size]):.3f}" for i in range(PARTS))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=VARIANTS)
    parser.add_argument("-d", "--dataset", required=True)
    parser.add_argument("-p", "--plans", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--constant", action="store_true", help="learning rate, instead of nnU-Net's fall to zero")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="(all)")
    options = parser.parse_args()
    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112
    torch.set_num_threads(1)
    rows, batches = [], []
    variants = VARIANTS[options.experiment]
    with tempfile.TemporaryDirectory() as results:
        os.environ["nnUNet_results"] = results  # noqa: SIM112
        for name in options.variants or variants:
            rows.append(list(cells(name, losses(variants[name], options, batches))))
            print(*rows[-1], flush=True)
    print(markdown_table(["", "first step", *[f"part {i + 1}" for i in range(PARTS)]], rows))


if __name__ == "__main__":
    main()
