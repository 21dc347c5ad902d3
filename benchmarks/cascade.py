"""Does meU-net's cascade help a rare, thin structure that only context tells apart? A phantom, trained for real.

The phantom: a thick winding tube (class 1), and thin winding tubes of the same brightness and radius. The thin one that
runs along the thick one, 24 voxels from its axis, is class 2 (about 0.1 % of the voxels); the others run elsewhere and
are background. In a patch of the default network (32) around a thin tube the thick one is out of sight; in the context
of stage 1 (56) it is not.

Default nnU-Net, stage 1, and stage 2 with post- and pre-concatenation are trained under one schedule by nnU-Net's own
commands, in two folds, so that every case is validated by models that have not seen it.

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

NAME, NUMBER = "Dataset950_CascadePhantom", "950"
PLANS, PRE_PLANS = "nnUNetMeCascadePlans", "nnUNetMeCascadePlansPre"
SIZE, N_CASES, N_FOLDS = 96, 10, 2
RADIUS, THIN = 6.0, 1.8  # voxels: thick tube, thin tubes
GAP = 24.0  # voxels between the axes of the thick tube and of class 2
N_OTHERS = 3
PATCH, CONTEXT, FEATURES = 32, 56, [8, 16, 32, 64]


def axis_points(random: np.random.Generator, centre: np.ndarray) -> np.ndarray:
    """Points of a winding line along the first axis, 0.5 voxels apart, that passes `centre` (y, x)."""
    t = np.arange(0, SIZE, 0.5)
    waves = [
        sum(
            random.uniform(2, 4) * np.sin(2 * np.pi * (t / random.uniform(50, 90) + random.random()))
            for _ in range(2)
        )
        for _ in range(2)
    ]
    return np.stack([t, centre[0] + waves[0], centre[1] + waves[1]], axis=1)


def distance_to(points: np.ndarray) -> np.ndarray:
    """Voxels from each voxel to a line."""
    free = np.ones((SIZE,) * 3, dtype=bool)
    index = np.round(points).astype(int)
    free[tuple(index[((index >= 0) & (index < SIZE)).all(axis=1)].T)] = False
    return distance_transform_edt(free)


def phantom(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels of one case."""
    random = np.random.default_rng(seed)
    thick = axis_points(random, random.uniform(0.35, 0.65, 2) * SIZE)
    angle = random.uniform(0, 2 * np.pi)
    along = thick + np.array([0, GAP * np.sin(angle), GAP * np.cos(angle)])
    to_thick = distance_to(thick)
    bright = to_thick <= RADIUS
    labels = bright.astype(np.uint8)
    wanted = distance_to(along) <= THIN
    others = np.zeros_like(bright)
    found = 0
    while found < N_OTHERS:
        line = axis_points(random, random.uniform(0.05, 0.95, 2) * SIZE)
        apart = np.abs(line - thick)[:, 1:]
        if np.hypot(*apart.T).min() > GAP + 12:
            others |= distance_to(line) <= THIN
            found += 1
    labels[wanted & ~bright] = 2
    image = (bright | wanted | others).astype(np.float32)
    image = gaussian_filter(image, 0.7) + random.normal(0, 0.15, image.shape)
    return image.astype(np.float32), labels


def write_dataset(raw: Path) -> float:
    """Write the data set in nnU-Net's format; return class 2's share of the voxels."""
    folder = raw / NAME
    shares = []
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i in range(N_CASES):
        image, labels = phantom(i)
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


def shrink_plans(folder: Path) -> None:
    """A small network and patch in the planner's plans, for post- and pre-concatenation; two folds."""
    plans = json.loads((folder / f"{PLANS}.json").read_text())
    configurations = plans["configurations"]
    for name in ("3d_fullres", "3d_me_context", "3d_post_concat"):
        configurations[name]["architecture"]["arch_kwargs"].update(
            n_stages=len(FEATURES),
            features_per_stage=FEATURES,
            kernel_sizes=[[3, 3, 3]] * len(FEATURES),
            strides=[[1, 1, 1]] + [[2, 2, 2]] * (len(FEATURES) - 1),
            n_conv_per_stage=[2] * len(FEATURES),
            n_conv_per_stage_decoder=[2] * (len(FEATURES) - 1),
        )
    configurations["3d_fullres"].update(patch_size=[PATCH] * 3, batch_size=2)
    configurations["3d_me_context"].update(
        patch_size=[CONTEXT] * 3, me_unet={"k": CONTEXT / PATCH, "standard_patch_size": [PATCH] * 3}
    )
    (folder / f"{PLANS}.json").write_text(json.dumps(plans))
    plans["plans_name"] = PRE_PLANS
    configurations["3d_post_concat"]["architecture"]["arch_kwargs"]["fusion"] = "pre"
    (folder / f"{PRE_PLANS}.json").write_text(json.dumps(plans))
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
    started = time.perf_counter()
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
    return {
        "thick": float(np.mean(dice["1"])),
        "thin": float(np.mean(dice["2"])),
        "thin_of_each_case": dice["2"],
        "minutes": (time.perf_counter() - started) / 60,
    }


def table(results: dict[str, dict[str, Any]], setting: dict[str, Any]) -> str:
    lines = [
        f"# A thin structure of {setting['share']:.2%} of the voxels, which only context tells apart",
        "",
        f"`{setting['command']}`",
        "",
        f"Mean Dice of {N_CASES} phantoms of {SIZE}^3 voxels, each validated by the fold that has not seen it; "
        f"schedule `{setting['schedule']}`, batch 2, features {FEATURES}, P = {PATCH}, kP = {CONTEXT}.",
        "",
        "| | thick tube (class 1) | thin tube (class 2) | worst, best case | minutes |",
        "|---|---|---|---|---|",
    ]
    for name, found in results.items():
        cases, minutes = found["thin_of_each_case"], found["minutes"]
        scores = f"{found['thick']:.3f} | {found['thin']:.3f} | {min(cases):.3f}, {max(cases):.3f}"
        lines.append(f"| {name} | {scores} | {minutes:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for data and trainings; resumed")
    parser.add_argument("--output", type=Path, required=True, help="folder of phantom.md and phantom.json")
    parser.add_argument("--schedule", default="20epochs_50iters_NoMirroring")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    work = options.work.resolve()
    for kind in ("raw", "preprocessed", "results"):
        (work / kind).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{kind}"] = str(work / kind)
    share = write_dataset(work / "raw")
    prepared = work / "preprocessed" / NAME
    if not (prepared / "splits_final.json").is_file():
        log = work / "log.txt"
        command(log, "nnUNetv2_extract_fingerprint", "-d", NUMBER, "-np", "1")
        command(log, "nnUNetv2_plan_experiment", "-d", NUMBER, "-pl", "MeCascadePlanner")
        command(
            log, "nnUNetv2_preprocess", "-d", NUMBER, "-plans_name", PLANS, "-c", "3d_fullres", "-np", "1"
        )
        shrink_plans(prepared)
    default, cascade = f"nnUNetTrainer_{options.schedule}", f"nnUNetTrainerMeCascade_{options.schedule}"
    results = {
        "default nnU-Net at P": train(work, "3d_fullres", PLANS, default, options.device),
        "stage 1, dual meU-net": train(work, "3d_me_context", PLANS, cascade, options.device),
        "stage 2, post-concatenation": train(work, "3d_post_concat", PLANS, cascade, options.device),
    }
    stage_one = work / "results" / NAME / f"{cascade}__{PRE_PLANS}__3d_me_context"
    if not stage_one.exists():
        stage_one.symlink_to(stage_one.with_name(f"{cascade}__{PLANS}__3d_me_context"))
    results["stage 2, pre-concatenation"] = train(work, "3d_post_concat", PRE_PLANS, cascade, options.device)
    setting = {
        "share": share,
        "schedule": options.schedule,
        "command": "python benchmarks/cascade.py --work WORK --output FOLDER"
        + ("" if options.schedule == parser.get_default("schedule") else f" --schedule {options.schedule}"),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    text = table(results, setting)
    (options.output / "phantom.md").write_text(text)
    (options.output / "phantom.json").write_text(
        json.dumps({"setting": setting, "results": results}, indent=2) + "\n"
    )
    print(text)


if __name__ == "__main__":
    main()
