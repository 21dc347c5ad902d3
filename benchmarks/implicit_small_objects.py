"""Small objects that sparse prediction of the Implicit U-Net misses and dense prediction of the same weights finds.

python benchmarks/implicit_small_objects.py --output docs/benchmarks/2026-11-28-implicit-small-objects --weights FOLDER

Trains four small networks (widths 8 to 32, decoder of width 64) on balls in noise and predicts unseen phantoms of small
balls on backgrounds that were not all in training: specks of one voxel, textures, no noise at all. An object is a true
ball; found is one that a voxel of its own label (region) touches. Weights in FOLDER are used again, so that another
version of the search is measured on the same networks. One thread; ratios of time are of its process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from reversible import markdown
from scipy import ndimage
from torch import Tensor

from nnunet_ext.api import create
from nnunet_ext.architectures.implicit.point_sampling import PointSampler, at_points
from nnunet_ext.architectures.implicit_unet import ImplicitUNet

TRAINING_SIZE, SIZE, PATCHES, BALLS = 32, 48, 6, 10
RADII = ((0.8, 1.6), (1.7, 2.4))
NOISE, SPECK = 0.25, 3.0
FEATURES = [8, 16, 32, 32]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one network is trained on and asked.

    Args:
        levels: Grey value of each kind of ball; of regions, of the ball and of its core.
        trained, asked: Backgrounds.
        regions: Whether labels are a ball and the core in it.
    """

    levels: tuple[float, ...]
    trained: tuple[str, ...]
    asked: tuple[str, ...]
    regions: bool = False


TASKS = {
    "bright balls": Task(
        levels=(1.0,),
        trained=("noise",),
        asked=("noise", "dark specks 1 %", "dark specks 3 %", "fine texture", "coarse texture", "no noise"),
    ),
    "grey balls": Task(
        levels=(1.0,),
        trained=("noise", "bright specks 2 %", "dark specks 2 %", "fine texture"),
        asked=("noise", "bright specks 1 %", "bright specks 3 %", "dark specks 3 %", "fine texture"),
    ),
    "bright and dark balls": Task(levels=(1.0, -1.0), trained=("noise",), asked=("noise", "bright specks 1 %")),
    "ball and core": Task(
        levels=(1.0, 2.0), trained=("noise",), asked=("noise", "dark specks 1 %", "dark specks 3 %"), regions=True
    ),
}


def phantom(
    task: Task, background: str, size: int, n: int, radii: Sequence[float], random: np.random.Generator
) -> tuple[Tensor, Tensor, Any]:
    """Image and target (1, C, size, size, size), and the number of the ball at each voxel."""
    voxels = np.moveaxis(np.indices((size,) * 3), 0, -1)
    labels, objects = np.zeros((2, *(size,) * 3), np.int16)
    placed: list[tuple[Any, float]] = []
    for _ in range(20 * n):
        radius, centre = random.uniform(*radii), random.uniform(radii[1] + 1, size - radii[1] - 2, 3)
        if len(placed) == n or any(np.linalg.norm(centre - c) < radius + r + 5 for c, r in placed):
            continue
        distance = ((voxels - centre) ** 2).sum(-1) ** 0.5
        if (distance <= radius).any():
            placed.append((centre, radius))
            objects[distance <= radius] = len(placed)
            labels[distance <= radius] = 1 if task.regions else 1 + len(placed) % len(task.levels)
            if task.regions:
                labels[distance <= 0.6 * radius] = 2
    grey = np.array([0.0, *task.levels])[labels] + on(background, ndimage.distance_transform_edt(labels == 0), random)
    target = np.stack([labels > 0, labels > 1]) if task.regions else labels[None]
    return torch.from_numpy(grey).float()[None, None], torch.from_numpy(target.astype(np.int16))[None], objects


def on(background: str, distance: Any, random: np.random.Generator) -> Any:
    """What is added to the grey values: noise everywhere, the rest only apart from the balls."""
    shape = distance.shape
    if background == "no noise":
        return np.zeros(shape)
    added = random.normal(0, NOISE, shape)
    kind, *rest = background.split()
    if rest and rest[0] == "specks":
        chosen = (random.random(shape) < float(rest[1]) / 100) & (distance > 2)
        added[chosen] = SPECK if kind == "bright" else -SPECK
    elif rest:
        texture = ndimage.gaussian_filter(random.normal(0, 1, shape), {"fine": 1, "coarse": 3}[kind])
        added += (distance > 2) * 0.5 * texture / texture.std()
    return added


def small_network(task: Task) -> ImplicitUNet:
    plan = {"n_stages": 4, "strides": [[1] * 3] + [[2] * 3] * 3, "kernel_sizes": [[3] * 3] * 4}
    plan |= {"n_conv_per_stage": [2] * 4, "n_conv_per_stage_decoder": [2] * 3, "features_per_stage": FEATURES}
    classes = 2 if task.regions else 1 + len(task.levels)
    network: Any = create("ImplicitUNet", 1, classes, [SIZE] * 3, decoder_width=64, n_points=2000, **plan)
    network.point_decoder.seg_layers.regions = task.regions
    return network  # type: ignore[no-any-return]


def train(network: ImplicitUNet, task: Task, steps: int, random: np.random.Generator) -> None:
    """Train as `nnUNetTrainerImplicit` does, with a larger step."""
    dice = {"batch_dice": True, "do_bg": task.regions, "ddp": False}
    loss_of = (
        DC_and_BCE_loss({}, dice, dice_class=MemoryEfficientSoftDiceLoss)
        if task.regions
        else DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    )
    sampler = PointSampler(network.n_points, 0.5, (2.0,) * 3)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, 0.9)
    network.train()
    for step in range(steps):
        kinds, radii = random.choice(task.trained, 2), [(0.8, 2.4), (0.8, 6.0)]
        pairs = [
            phantom(task, kind, TRAINING_SIZE, int(random.integers(1, 8)), r, random)
            for kind, r in zip(kinds, radii, strict=True)
        ]
        images, targets = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
        points = sampler(targets, regions=task.regions)
        loss = loss_of(network(images, points=points), at_points(targets, points))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(step, loss.item(), flush=True)


@torch.inference_mode()
def predicted(network: ImplicitUNet, image: Tensor, sparse: bool) -> tuple[Tensor, float]:
    """Labels or regions (1, C, *size), as targets are, and seconds."""
    network.sparse = sparse
    start = time.process_time()
    logits = network(image)
    seconds = time.process_time() - start
    regions = network.point_decoder.seg_layers.regions
    return (logits > 0 if regions else logits.argmax(1, keepdim=True)), seconds


def found(prediction: Tensor, target: Tensor, objects: Any) -> set[tuple[int, int]]:
    """Channel and number of the balls that the prediction touches with the right label."""
    hits = ((prediction == target) & (target > 0))[0].numpy()
    return {(channel, int(n)) for channel, hit in enumerate(hits) for n in np.unique(objects[hit])}


def compare(network: ImplicitUNet, task: Task, background: str, radii: tuple[float, float]) -> dict[str, Any]:
    """Predict unseen phantoms sparsely and densely."""
    random = np.random.default_rng(1)
    network.refined_share(reset=True)
    n_dense = n_missed = 0
    spent = {True: 0.0, False: 0.0}
    for _ in range(PATCHES):
        image, target, objects = phantom(task, background, SIZE, BALLS, radii, random)
        touched = {}
        for sparse in (True, False):
            prediction, seconds = predicted(network, image, sparse)
            touched[sparse] = found(prediction, target, objects)
            spent[sparse] += seconds
        n_dense, n_missed = n_dense + len(touched[False]), n_missed + len(touched[False] - touched[True])
    return {
        "background": background,
        "radius [voxels]": f"{radii[0]} to {radii[1]}",
        "objects of dense": n_dense,
        "missed": n_missed,
        "refined share": network.refined_share(reset=True),
        "sparse to dense [time]": spent[True] / spent[False],
    }


def trained(name: str, task: Task, steps: int, weights: Path) -> ImplicitUNet:
    """A network from the weights of an earlier run, else a new one."""
    torch.manual_seed(0)
    network, file = small_network(task), weights / f"{name.replace(' ', '_')}.pth"
    if file.is_file():
        network.load_state_dict(torch.load(file, weights_only=True))
    else:
        train(network, task, steps, np.random.default_rng(0))
        weights.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), file)
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="folder of the trained networks")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, task in TASKS.items():
        network = trained(name, task, options.steps, options.weights)
        for background in task.asked:
            rows += [{"network": name, **compare(network, task, background, radii)} for radii in RADII]
            print(markdown(rows[-2:]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    tasks = {name: asdict(task) for name, task in TASKS.items()}
    result = {"steps": options.steps, "torch": torch.__version__, "tasks": tasks, "rows": rows}
    (options.output / "small_objects.json").write_text(json.dumps(result, indent=2) + "\n")
    text = f"# Small objects: networks of {options.steps} steps, {PATCHES} phantoms of {BALLS} balls for each row"
    (options.output / "small_objects.md").write_text(f"{text}\n\n{markdown(rows)}\n")


if __name__ == "__main__":
    main()
