"""Does context pay? Every method trained on a phantom whose rare, thin structure only context tells apart.

The phantom: a thick winding tube (class 1), and thin tubes of one brightness and radius that wind along it. The one 13
voxels from its axis is class 2 (about 0.1 % of the voxels); three at twice the distance are background. At the centre
of the small patch P (16) a thin tube looks like any other; the large one kP (28) shows what is next to it.

Default nnU-Net at P and at kP, its rivals and every method at kP, and both stages of
meU-net's cascade are trained under one schedule by nnU-Net itself, in two folds, so that every case is validated by
models that have not seen it. Their Dice stands beside the peak of a training step, counted in float16 autocast.

example: python benchmarks/context.py --work /tmp/phantom --output docs/benchmarks/DATE-context
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import distance_transform_edt, gaussian_filter

from benchmarks.learning import PRECISIONS, Training, run_all
from benchmarks.trade_off import MIB, Point, svg
from nnunet_ext.console import arguments
from nnunet_ext.escaping import markdown_table
from nnunet_ext.files import write_bytes, write_text
from nnunet_ext.memory.count import training_memory
from nnunet_ext.nnunet.patch_plans import narrow
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.source import Source

NAME, NUMBER = "Dataset950_CascadePhantom", "950"
PLANS, PRE_PLANS, LARGE_PLANS = (f"nnUNetMeCascadePlans{suffix}" for suffix in ("", "Pre", "Large"))
SIZE, N_CASES, N_FOLDS = 64, 12, 2
RADIUS = 3.5  # voxels, thick tube
GAP = 13.0  # voxels between the axes of the thick tube and of class 2; the other thin tubes are twice as far
N_OTHERS = 3
PATCH, CONTEXT, FEATURES = 16, 28, [8, 16, 32]
HOST, FIRST, SECOND = "3d_fullres", "3d_me_context", "3d_post_concat"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train.

    Args:
        name: In table and figure.
        method: Of the trainer nnUNetTrainer<method>.
        plans, configuration: Which of the plans below.
    """

    name: str
    method: str
    plans: str = LARGE_PLANS
    configuration: str = HOST

    @property
    def trainer(self) -> str:
        """Without a schedule."""
        return f"nnUNetTrainer{self.method}"

    @property
    def key(self) -> str:
        """What papers.md calls it: the trainer, and what else tells it apart."""
        told = [] if self.configuration == HOST else [self.configuration]
        named = {PRE_PLANS: ["pre"], PLANS: ["P"] if self.configuration == HOST else []}
        return ", ".join([self.trainer, *told, *named.get(self.plans, [])])


# Stages 2 stand after their stages 1.
ROWS = (
    Row(name="default at P", method="", plans=PLANS),
    Row(name="default at kP", method=""),
    Row(name="activation checkpointing", method="ActivationCheckpointing"),
    Row(name="half width with batch norm", method="HalfWidthBN"),
    Row(name="reversible", method="Reversible"),
    Row(name="invertible", method="InvertibleNoVAE"),
    Row(name="partially invertible", method="PartiallyInvertibleNoVAE"),
    Row(name="implicit", method="ImplicitLite"),
    Row(name="FasterFusion at the coarsest level", method="FasterFusionFast"),
    Row(name="meU-net, two passes", method="MeUNet"),
    Row(name="meU-net, one pass", method="MeUNetOnePass"),
    Row(name="meU-net, checkpointed", method="MeCheckpointing"),
    Row(name="meU-net, reversible", method="MeReversible"),
    Row(name="cascade, two passes, stage 1", method="MeCascade", plans=PLANS, configuration=FIRST),
    Row(name="cascade, two passes, stage 2", method="MeCascade", plans=PLANS, configuration=SECOND),
    Row(name="cascade, one pass, stage 1", method="MeCascadeOnePass", plans=PLANS, configuration=FIRST),
    Row(name="cascade, one pass, stage 2", method="MeCascadeOnePass", plans=PLANS, configuration=SECOND),
    Row(name="the same, pre-concatenated", method="MeCascadeOnePass", plans=PRE_PLANS, configuration=SECOND),
)


def axis_points(random: np.random.Generator, centre: np.ndarray) -> np.ndarray:
    """Points of a winding line along the first axis, 0.5 voxels apart, around `centre` (y, x)."""
    t = np.arange(0, SIZE, 0.5)
    waves = [
        sum(random.uniform(1, 2) * np.sin(2 * np.pi * (t / random.uniform(30, 60) + random.random())) for _ in range(2))
        for _ in range(2)
    ]
    return np.stack([t, centre[0] + waves[0], centre[1] + waves[1]], axis=1)


def distance_to(points: np.ndarray) -> np.ndarray:
    """Voxels from each voxel to a line."""
    index = np.round(points).astype(int)
    index = index[((index >= 0) & (index < SIZE)).all(axis=1)]
    if not len(index):
        return np.full((SIZE,) * 3, np.inf)
    free = np.ones((SIZE,) * 3, dtype=bool)
    free[tuple(index.T)] = False
    return distance_transform_edt(free)


def phantom(seed: int, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels of one case, with thin tubes of this radius in voxels."""
    random = np.random.default_rng(seed)
    thick = axis_points(random, random.uniform(0.4, 0.6, 2) * SIZE)
    angle = random.uniform(0, 2 * np.pi)

    def thin(gap: float, turn: float) -> np.ndarray:
        aside = np.array([0, np.sin(angle + turn), np.cos(angle + turn)])
        return distance_to(thick + gap * aside) <= radius

    bright = distance_to(thick) <= RADIUS
    wanted = thin(GAP, 0)
    turns = [2 * np.pi * i / N_OTHERS + random.uniform(-0.4, 0.4) for i in range(N_OTHERS)]
    others = np.any([thin(2 * GAP, turn) for turn in turns], axis=0)
    labels = bright.astype(np.uint8)
    labels[wanted] = 2
    image = gaussian_filter((bright | wanted | others).astype(np.float32), 0.7)
    image += random.normal(0, 0.15, image.shape)
    return image, labels


def write_dataset(raw: Path, radius: float) -> None:
    """Write the data set in nnU-Net's format; its description last."""
    folder = raw / NAME
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i in range(N_CASES):
        image, labels = phantom(i, radius)
        sitk.WriteImage(sitk.GetImageFromArray(image), str(folder / "imagesTr" / f"case{i}_0000.nii.gz"))
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(folder / "labelsTr" / f"case{i}.nii.gz"))
    description = {
        "channel_names": {"0": "microCT"},
        "labels": {"background": 0, "thick": 1, "thin": 2},
        "numTraining": N_CASES,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def share_of_thin(raw: Path) -> float:
    """Share of the voxels of class 2."""
    labels = [sitk.GetArrayFromImage(sitk.ReadImage(path)) for path in (raw / NAME / "labelsTr").iterdir()]
    return float(np.mean([label == 2 for label in labels]))


def write_plans(folder: Path) -> None:
    """A small network and patch in the planner's plans; copies for pre-concatenation and the large patch; two folds."""
    plans = json.loads((folder / f"{PLANS}.json").read_text())
    configurations = plans["configurations"]
    small = narrow(Source(patch=(PATCH,) * 3).setting(), FEATURES).configuration_manager
    for name in (HOST, FIRST, SECOND):
        configurations[name]["architecture"]["arch_kwargs"].update(small.configuration["architecture"]["arch_kwargs"])
    host = configurations[HOST]
    options = configurations[SECOND]["architecture"]["arch_kwargs"]
    expanded = {"patch_size": [CONTEXT] * 3, "me_unet": {"k": CONTEXT / PATCH, "standard_patch_size": [PATCH] * 3}}
    configurations[FIRST].update(expanded)
    host.update(patch_size=[PATCH] * 3, batch_size=2, batch_dice=True)  # as for images of many patches
    # The large patch last: its keys stay.
    for name, fusion, patch in ((PLANS, "post", {}), (PRE_PLANS, "pre", {}), (LARGE_PLANS, "post", expanded)):
        plans["plans_name"], options["fusion"] = name, fusion
        host.update(patch)
        (folder / f"{name}.json").write_text(json.dumps(plans))
    cases = [f"case{i}" for i in range(N_CASES)]
    folds = [cases[fold::N_FOLDS] for fold in range(N_FOLDS)]
    splits = [{"train": sorted(set(cases) - set(fold)), "val": fold} for fold in folds]
    (folder / "splits_final.json").write_text(json.dumps(splits))


def command(log: Path, *parts: str) -> None:
    """Run one of nnU-Net's commands."""
    with log.open("a", encoding="utf-8") as stream:
        subprocess.run(arguments(parts, os.environ), stdout=stream, stderr=stream, check=True)


def prepare(work: Path, radius: float) -> float:
    """Make data set and plans where they are not yet; return class 2's share of the voxels."""
    for kind in ("raw", "preprocessed", "results"):
        (work / kind).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{kind}"] = str(work / kind)
    if not (work / "raw" / NAME / "dataset.json").is_file():
        write_dataset(work / "raw", radius)
    prepared, log = work / "preprocessed" / NAME, work / "log.txt"
    if not (prepared / "splits_final.json").is_file():
        command(log, "nnUNetv2_extract_fingerprint", "-d", NUMBER, "-np", "1")
        command(log, "nnUNetv2_plan_experiment", "-d", NUMBER, "-pl", "MeCascadePlanner")
        command(log, "nnUNetv2_preprocess", "-d", NUMBER, "-plans_name", PLANS, "-c", HOST, "-np", "1")
        write_plans(prepared)
    return share_of_thin(work / "raw")


def trainings(row: Row, options: argparse.Namespace) -> list[Training]:
    """Of all folds."""
    trainer = f"{row.trainer}_{options.schedule}"
    common = {"dataset": NAME, "device": options.device, "precision": options.precision}
    parts = {"trainer": trainer, "plans": row.plans, "configuration": row.configuration}
    return [Training(**common, **parts, fold=str(fold)) for fold in range(N_FOLDS)]


def train(options: argparse.Namespace) -> bool:
    """Train what is not yet trained: what needs nothing, then the second stages, whose folds need all of the first.

    Returns:
        Whether nothing failed.
    """
    failed = []
    for stage in ((HOST, FIRST), (SECOND,)):
        todo = [one for row in ROWS if row.configuration in stage for one in trainings(row, options)]
        for one in todo:
            first = one.folder.parent.with_name(f"{one.trainer}__{PRE_PLANS}__{FIRST}")
            if one.plans == PRE_PLANS and not os.path.lexists(first):
                first.parent.mkdir(parents=True, exist_ok=True)
                first.symlink_to(f"{one.trainer}__{PLANS}__{FIRST}")
        failed += run_all(todo, options.jobs)
    return not failed


def result(row: Row, options: argparse.Namespace) -> dict[str, Any] | None:
    """Dice of the cases of all folds, and counted memory; None where a fold is not trained."""
    folds = trainings(row, options)
    if not all(one.is_done for one in folds):
        return None
    summaries = [json.loads((one.folder / "validation" / "summary.json").read_text()) for one in folds]
    cases = [case["metrics"] for summary in summaries for case in summary["metric_per_case"]]
    model = folds[0].folder.parent
    plans, dataset = (json.loads((model / f"{name}.json").read_text()) for name in ("plans", "dataset"))
    setting = Setting(plans=plans, dataset=dataset, configuration=row.configuration)
    return {
        "key": row.key,
        "name": row.name,
        "trainer": row.trainer,
        "plans": row.plans,
        "configuration": row.configuration,
        "peak": training_memory(setting, row.trainer).peak,
        "thick": mean(case["1"]["Dice"] for case in cases),
        "thin": [case["2"]["Dice"] for case in cases],
    }


def rows_table(results: Sequence[dict[str, Any]]) -> str:
    """A line for each row, numbered as in the figure."""
    lines = []
    for number, found in enumerate(results, 1):
        thin = found["thin"]
        dice = [f"{found['thick']:.3f}", f"{mean(thin):.3f}", f"{min(thin):.3f}, {max(thin):.3f}"]
        lines.append([str(number), found["name"], f"`{found['trainer']}`", f"{found['peak'] / MIB:.1f}", *dice])
    return markdown_table(["", "", "trainer", "peak [MB]", "thick tube", "thin tube", "worst, best case"], lines)


def page(results: Sequence[dict[str, Any]], setting: dict[str, Any]) -> str:
    """Setting, figure and table."""
    lines = [
        f"# Does context pay: a structure of {setting['share']:.2%} of the voxels, which only context tells apart",
        "",
        f"`{setting['command']}`",
        "",
        f"Mean Dice of {N_CASES} phantoms of {SIZE}^3 voxels, thin tubes of radius {setting['radius']}, each validated "
        f"by the fold that has not seen it; schedule `{setting['schedule']}`, {setting['precision']}, batch 2, "
        f"features {FEATURES}, P = {PATCH}, kP = {CONTEXT}. One training of each fold from one seed. Peak: of a "
        "training step in float16 autocast, counted; 1 MB is 2\\*\\*20 bytes.",
        "",
        "![Dice of the thin tube against memory](context.svg)",
        "",
    ]
    return "\n".join([*lines, rows_table(results), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and trainings; resumed")
    parser.add_argument("--output", type=Path, required=True, help="folder of context.md, context.json, context.svg")
    parser.add_argument("--radius", type=float, default=1.3, help="of the thin tubes, voxels")
    parser.add_argument("--schedule", default="24epochs_100iters_NoMirroring")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (1)")
    parser.add_argument("--no-training", action="store_true", help="show what is trained")
    options = parser.parse_args()
    asked = "".join(
        f" --{name} {getattr(options, name)}"
        for name in ("radius", "schedule", "precision")
        if getattr(options, name) != parser.get_default(name)
    )
    setting = {
        "share": prepare(options.work.resolve() / f"radius_{options.radius:g}", options.radius),
        "schedule": options.schedule,
        "radius": options.radius,
        "precision": options.precision,
        "command": "python benchmarks/context.py --work WORK --output FOLDER" + asked,
    }
    is_whole = options.no_training or train(options)
    results = [found for row in ROWS if (found := result(row, options)) is not None]
    points = [Point(name=r["name"], dice=mean(r["thin"]), peak=r["peak"]) for r in results]
    options.output.mkdir(parents=True, exist_ok=True)
    write_bytes(options.output / "context.svg", svg(points, "Mean Dice of the thin tube"))
    write_text(options.output / "context.json", json.dumps({"setting": setting, "results": results}, indent=2) + "\n")
    write_text(options.output / "context.md", page(results, setting))
    sys.exit(0 if is_whole else 1)


if __name__ == "__main__":
    main()
