"""Sparse compared with dense prediction where many organs fill the image: does looking sparsely still pay?

python benchmarks/implicit_organs.py --output docs/benchmarks/DATE-implicit [--steps 600]

Trains a small Implicit U-Net on phantoms of 13 ellipsoids with grey levels of their own, half of them with organs
apart, half with organs that touch, then predicts unseen ones of both kinds sparsely and densely, and times a U-Net of
the same encoder widths for comparison. Process time of one thread, so the ratios hold on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from implicit_real import mean_dice, missed_objects
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from reversible import markdown
from torch import Tensor, nn

from nnunet_ext.api import create
from nnunet_ext.architectures.implicit.point_sampling import PointSampler, at_points
from nnunet_ext.architectures.implicit_unet import ImplicitUNet

SIZE, ORGANS, FEATURES = 64, 13, [16, 32, 64, 128, 128]
RADII = {"organs apart": (4.0, 8.0), "organs touch": (11.0, 16.0)}


def phantom(kind: str, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Image (1, 1, 64, 64, 64) and labels of the same shape: jittered places, radii in voxels."""
    grid = np.stack(np.meshgrid(*[np.arange(SIZE)] * 3, indexing="ij"))
    places = [(x, y, z) for x in (12, 32, 52) for y in (12, 32, 52) for z in (18, 46)][:ORGANS]
    labels = np.zeros((SIZE,) * 3, np.int16)
    for organ, place in enumerate(places, start=1):
        centre = np.array(place) + random.uniform(-3, 3, 3)
        radii = random.uniform(*RADII[kind], 3)
        distance = ((grid - centre[:, None, None, None]) / radii[:, None, None, None]) ** 2
        labels[distance.sum(0) < 1] = organ
    image = labels / ORGANS * 4 - 2 + random.normal(0, 0.05, labels.shape)
    return torch.from_numpy(image).float()[None, None], torch.from_numpy(labels)[None, None]


def create_small(name: str, **options: Any) -> nn.Module:
    return create(name, 1, ORGANS + 1, [SIZE] * 3, features_per_stage=FEATURES, **options)


def train(network: ImplicitUNet, steps: int, random: np.random.Generator) -> None:
    """Train as `nnUNetTrainerImplicit` does, with a larger step."""
    loss_of = DC_and_CE_loss({"batch_dice": True, "do_bg": False, "ddp": False}, {})
    sampler = PointSampler(network.n_points, 0.5, (5.0,) * 3)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, 0.9)
    network.train()
    for step in range(steps):
        pairs = [phantom(kind, random) for kind in RADII]
        images, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        points = sampler(labels)
        loss = loss_of(network(images, points=points), at_points(labels, points))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(step, loss.item(), flush=True)


def timed(work: Callable[[], Tensor]) -> tuple[Any, float]:
    """Labels (64, 64, 64) and seconds."""
    start = time.process_time()
    logits = work()
    return logits[0].argmax(0).numpy(), time.process_time() - start


@torch.inference_mode()
def compare(network: ImplicitUNet, default: nn.Module, kind: str, random: np.random.Generator) -> dict[str, Any]:
    """Predict one unseen phantom."""
    image, labels = phantom(kind, random)
    organs = list(range(1, ORGANS + 1))
    network.sparse = True
    network.refined_share(reset=True)
    sparse, sparse_seconds = timed(lambda: network(image))
    share = network.refined_share(reset=True)
    network.sparse = False
    dense, dense_seconds = timed(lambda: network(image))
    _, default_seconds = timed(lambda: default(image))
    objects, missed = missed_objects(sparse, dense, organs)
    scores = [mean_dice(found, labels[0, 0].numpy(), organs) for found in (sparse, dense)]
    return {
        "phantom": kind,
        "Dice sparse": scores[0],
        "Dice dense": scores[1],
        "refined share": share,
        "sparse to dense [time]": sparse_seconds / dense_seconds,
        "sparse to U-Net [time]": sparse_seconds / default_seconds,
        "objects": objects,
        "missed": missed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=128, help="of the decoder")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = create_small("ImplicitUNet", decoder_width=options.width, n_points=3750)
    train(network, options.steps, np.random.default_rng(0))
    network.eval()
    default = create_small("PlainConvUNet").eval()
    unseen = np.random.default_rng(1)
    rows = []
    for kind in RADII:
        found = [compare(network, default, kind, unseen) for _ in range(5)]
        numbers = [key for key in found[0] if key != "phantom"]
        rows.append({"phantom": kind, **{key: mean(row[key] for row in found) for key in numbers}})
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "organs.json").write_text(json.dumps(rows, indent=2) + "\n")
    text = f"# 13 organs, {options.steps} steps, width {options.width}, means of 5 unseen phantoms\n\n"
    (options.output / "organs.md").write_text(text + markdown(rows) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
