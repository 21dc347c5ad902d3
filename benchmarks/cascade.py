"""Does meU-net's cascade help a rare, thin structure that only context tells apart? A phantom, trained for real.

The phantom: a thick winding tube (class 1), and thin tubes of one brightness and radius that wind along it. The one 13
voxels from its axis is class 2 (about 0.1 % of the voxels); three at twice the distance are background. At the centre
of a patch of default nnU-Net (16) a thin tube looks like any other; the context of stage 1 (24 and 28) shows what
is next to it.

Default nnU-Net at the small and at the large patch, meU-net in one pass, stage 1 in two passes and in one, and stage 2
with post- and pre-concatenation are trained under one schedule by nnU-Net's own commands, in two folds, so that every
case is validated by models that have not seen it.

example: python benchmarks/cascade.py --work /tmp/phantom --output docs/benchmarks/2026-11-21-cascade
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import distance_transform_edt, gaussian_filter

from nnunet_ext.escaping import markdown_table
from nnunet_ext.nnunet.patch_plans import narrow
from nnunet_ext.nnunet.source import Source

NAME, NUMBER = "Dataset950_CascadePhantom", "950"
PLANS, PRE_PLANS, LARGE_PLANS = (f"nnUNetMeCascadePlans{suffix}" for suffix in ("", "Pre", "Large"))
SIZE, N_CASES, N_FOLDS = 64, 12, 2
RADIUS = 3.5  # voxels, thick tube
GAP = 13.0  # voxels between the axes of the thick tube and of class 2; the other thin tubes are twice as far
N_OTHERS = 3
PATCH, CONTEXT, FEATURES = 16, 28, [8, 16, 32]


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


def write_dataset(raw: Path, radius: float) -> float:
    """Write the data set in nnU-Net's format; return class 2's share of the voxels."""
    folder = raw / NAME
    shares = []
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i in range(N_CASES):
        image, labels = phantom(i, radius)
        shares.append(float((labels == 2).mean()))
        sitk.WriteImage(sitk.GetImageFromArray(image), str(folder / "imagesTr" / f"case{i}_0000.nii.gz"))
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(folder / "labelsTr" / f"case{i}.nii.gz"))
    description = {
        "channel_names": {"0": "microCT"},
        "labels": {"background": 0, "thick": 1, "thin": 2},
        "numTraining": N_CASES,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return float(np.mean(shares))


def write_plans(folder: Path) -> None:
    """A small network and patch in the planner's plans; copies for pre-concatenation and the large patch; two folds."""
    plans = json.loads((folder / f"{PLANS}.json").read_text())
    configurations = plans["configurations"]
    small = narrow(Source(patch=(PATCH,) * 3).setting(), FEATURES).configuration_manager
    for name in ("3d_fullres", "3d_me_context", "3d_post_concat"):
        configurations[name]["architecture"]["arch_kwargs"].update(small.configuration["architecture"]["arch_kwargs"])
    host = configurations["3d_fullres"]
    options = configurations["3d_post_concat"]["architecture"]["arch_kwargs"]
    configurations["3d_me_context"].update(
        patch_size=[CONTEXT] * 3, me_unet={"k": CONTEXT / PATCH, "standard_patch_size": [PATCH] * 3}
    )
    variants = ((PLANS, "post", PATCH), (PRE_PLANS, "pre", PATCH), (LARGE_PLANS, "post", CONTEXT))
    for name, fusion, patch in variants:
        plans["plans_name"], options["fusion"] = name, fusion
        host.update(patch_size=[patch] * 3, batch_size=2, batch_dice=True)  # as for images of many patches
        (folder / f"{name}.json").write_text(json.dumps(plans))
    cases = [f"case{i}" for i in range(N_CASES)]
    folds = [cases[fold::N_FOLDS] for fold in range(N_FOLDS)]
    splits = [{"train": sorted(set(cases) - set(fold)), "val": fold} for fold in folds]
    (folder / "splits_final.json").write_text(json.dumps(splits))


def command(log: Path, name: str, *arguments: str) -> None:
    with log.open("a") as stream:
        script = Path(sys.executable).with_name(name)
        subprocess.run([str(script), *arguments], stdout=stream, stderr=stream, check=True)


def train(work: Path, configuration: str, plans: str, trainer: str, device: str) -> dict[str, Any]:
    """Train and validate all folds, or read what an earlier call has trained."""
    folder = work / "results" / NAME / f"{trainer}__{plans}__{configuration}"
    for fold in range(N_FOLDS):
        if not (folder / f"fold_{fold}" / "validation" / "summary.json").is_file():
            print(f"{time.strftime('%H:%M:%S')} {folder.name} fold {fold}", flush=True)
            command(
                work / "log.txt",
                "nnUNetv2_train",
                NUMBER,
                configuration,
                str(fold),
                "-p",
                plans,
                "-tr",
                trainer,
                "-device",
                device,
            )
    cases: list[dict[str, Any]] = []
    for fold in range(N_FOLDS):
        summary = json.loads((folder / f"fold_{fold}" / "validation" / "summary.json").read_text())
        cases += summary["metric_per_case"]
    dice = {label: [case["metrics"][label]["Dice"] for case in cases] for label in ("1", "2")}
    return {"thick": float(np.mean(dice["1"])), "thin": float(np.mean(dice["2"])), "thin_of_each_case": dice["2"]}


def table(results: dict[str, dict[str, Any]], setting: dict[str, Any]) -> str:
    lines = [
        f"# A thin structure of {setting['share']:.2%} of the voxels, which only context tells apart",
        "",
        f"`{setting['command']}`",
        "",
        f"Mean Dice of {N_CASES} phantoms of {SIZE}^3 voxels, thin tubes of radius {setting['radius']}, each validated "
        f"by the fold that has not seen it; schedule `{setting['schedule']}`, batch 2, features {FEATURES}, "
        f"P = {PATCH}, kP = {CONTEXT}.",
        "",
    ]
    rows = []
    for name, found in results.items():
        cases = found["thin_of_each_case"]
        worst_best = f"{min(cases):.3f}, {max(cases):.3f}"
        rows.append([name, f"{found['thick']:.3f}", f"{found['thin']:.3f}", worst_best])
    header = ["", "thick tube (class 1)", "thin tube (class 2)", "worst, best case"]
    return "\n".join([*lines, markdown_table(header, rows), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and trainings; resumed")
    parser.add_argument("--output", type=Path, required=True, help="folder of phantom.md and phantom.json")
    parser.add_argument("--radius", type=float, default=1.3, help="of the thin tubes, voxels")
    parser.add_argument("--schedule", default="24epochs_100iters_NoMirroring")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    work = options.work.resolve() / f"radius_{options.radius:g}"  # another phantom, another data set
    for kind in ("raw", "preprocessed", "results"):
        (work / kind).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{kind}"] = str(work / kind)
    share = write_dataset(work / "raw", options.radius)
    prepared = work / "preprocessed" / NAME
    if not (prepared / "splits_final.json").is_file():
        log = work / "log.txt"
        command(log, "nnUNetv2_extract_fingerprint", "-d", NUMBER, "-np", "1")
        command(log, "nnUNetv2_plan_experiment", "-d", NUMBER, "-pl", "MeCascadePlanner")
        command(log, "nnUNetv2_preprocess", "-d", NUMBER, "-plans_name", PLANS, "-c", "3d_fullres", "-np", "1")
        write_plans(prepared)
    default, cascade, one_pass, cascade_one_pass = (
        f"nnUNetTrainer{method}_{options.schedule}" for method in ("", "MeCascade", "MeUNetOnePass", "MeCascadeOnePass")
    )
    results = {
        "default nnU-Net at P": train(work, "3d_fullres", PLANS, default, options.device),
        "default nnU-Net at kP": train(work, "3d_fullres", LARGE_PLANS, default, options.device),
        "meU-net at kP, one pass": train(work, "3d_fullres", LARGE_PLANS, one_pass, options.device),
        "stage 1, dual meU-net": train(work, "3d_me_context", PLANS, cascade, options.device),
        "stage 1, one pass": train(work, "3d_me_context", PLANS, cascade_one_pass, options.device),
        "stage 2, post-concatenation": train(work, "3d_post_concat", PLANS, cascade, options.device),
        "stage 2 after one pass": train(work, "3d_post_concat", PLANS, cascade_one_pass, options.device),
    }
    stage_one = work / "results" / NAME / f"{cascade}__{PRE_PLANS}__3d_me_context"
    if not stage_one.exists():
        stage_one.symlink_to(stage_one.with_name(f"{cascade}__{PLANS}__3d_me_context"))
    results["stage 2, pre-concatenation"] = train(work, "3d_post_concat", PRE_PLANS, cascade, options.device)
    asked = "".join(
        f" --{name} {getattr(options, name)}"
        for name in ("radius", "schedule")
        if getattr(options, name) != parser.get_default(name)
    )
    setting = {
        "share": share,
        "schedule": options.schedule,
        "radius": options.radius,
        "command": "python benchmarks/cascade.py --work WORK --output FOLDER" + asked,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    text = table(results, setting)
    (options.output / "phantom.md").write_text(text)
    (options.output / "phantom.json").write_text(json.dumps({"setting": setting, "results": results}, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
