"""Norm of the encoder's gradient from each term of the VAE trainers' loss, at the start and after some steps.

python benchmarks/vae_gradients.py --output docs/benchmarks/DATE-vae [--patch 64] [--steps 0 1 5]

The fully invertible U-Net on one patch of noise with a bright ball and a smaller one, two labels: nnU-Net's loss,
optimiser and clipping, float32, CPU. The latent starts as the prior, as in the trainers, or as nnU-Net initialises
convolutions (He). Writes gradients.json and gradients.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from nnunet_ext.api import create
from nnunet_ext.architectures.expanded.partial_pass import downsample_labels
from nnunet_ext.escaping import markdown_table
from nnunet_ext.trainers.vae import VAELoss, VAETrainerMixin

WEIGHTS = {"l2_weight": VAETrainerMixin.l2_weight, "kl_weight": VAETrainerMixin.kl_weight}
Row = dict[str, Any]


def patch_of(size: int) -> tuple[Tensor, Tensor]:
    """An image, (1, 1, size, size, size), and its labels."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(size) / size] * 3, indexing="ij"))
    labels = torch.zeros(size, size, size)
    for label, (centre, radius) in enumerate([(0.4, 0.25), (0.8, 0.1)], start=1):
        labels[(grid - centre).square().sum(0) < radius**2] = label
    image = labels + torch.randn(labels.shape)
    return ((image - image.mean()) / image.std())[None, None], labels[None, None]


def segmentation_loss(levels: int) -> nn.Module:
    """nnU-Net's loss, with the weights of its deep supervision."""
    loss = DC_and_CE_loss(
        {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}, dice_class=MemoryEfficientSoftDiceLoss
    )
    weights = torch.tensor([1 / 2**i for i in range(levels - 1)] + [0.0])
    return DeepSupervisionWrapper(loss, (weights / weights.sum()).tolist())


def norms(network: Any, output: Any, targets: list[Tensor], segmentation: nn.Module) -> Row:
    """Norms of the encoder's gradient, by term."""
    l2, kl = output[1].losses("voxel")
    terms = {
        "segmentation": segmentation(output[0], targets),
        "0.1 L2": WEIGHTS["l2_weight"] * l2,
        "0.1 KL per voxel": WEIGHTS["kl_weight"] * kl,
    }
    parameters = list(network.encoder.parameters())
    found: Row = {"KL per voxel": kl.item()}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        found[name] = torch.stack([g.norm() for g in gradients if g is not None]).norm().item()
    # The other form is a multiple (tests/architectures/test_invertible_unets.py).
    voxels_of_a_latent = output[1].image[0, 0].numel() / output[1].mean[0].numel()
    return {**found, "0.1 KL per latent": found["0.1 KL per voxel"] * voxels_of_a_latent}


def trajectory(size: int, steps: Sequence[int], start: str) -> Iterator[Row]:
    """Rows at `steps` of a training with the trainers' loss."""
    torch.manual_seed(0)
    image, labels = patch_of(size)
    options = {"vae": True, "image_channels": 1, "deep_supervision": True}
    network = cast(Any, create("InvertibleUNet", 1, 3, [size] * 3, **options)).train()
    if start == "He":
        for conv in (network.vae.mean, network.vae.log_variance):
            conv.apply(InitWeights_He(1e-2))
    levels = len(network.decoder.seg_layers)
    targets = [downsample_labels(labels, [2**i] * 3) for i in range(levels)]
    loss = VAELoss(segmentation_loss(levels), **WEIGHTS)
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-2, momentum=0.99, weight_decay=3e-5, nesterov=True)
    for step in range(max(steps) + 1):
        output = network(image)
        if step in steps:
            yield {"start of the latent": start, "steps": step, **norms(network, output, targets, loss.segmentation)}
        if step < max(steps):
            optimiser.zero_grad()
            loss(output, targets).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 12)
            optimiser.step()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--patch", type=int, default=64, help="voxels per axis")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 1, 5])
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for start, steps in (("He", [0]), ("prior", arguments.steps)):
        for row in trajectory(arguments.patch, steps, start):
            rows.append(row)
            print(row, flush=True)
    (arguments.output / "gradients.json").write_text(json.dumps({"patch": arguments.patch, "rows": rows}, indent=1))
    cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    options = f"--patch {arguments.patch} --steps {' '.join(map(str, arguments.steps))}"
    (arguments.output / "gradients.md").write_text(
        f"# Norm of the encoder's gradient by term of the loss, patch {arguments.patch}^3\n\n"
        f"`python benchmarks/vae_gradients.py {options} --output FOLDER`\n\n{markdown_table(list(rows[0]), cells)}\n"
    )


if __name__ == "__main__":
    main()
