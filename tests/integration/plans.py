"""Planning and preprocessing of a data set, once for all trainers: nnU-Net's commands, and networks made narrow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

from nnunet_ext import registry
from tests.integration.forms import Form

PLANS = "nnUNetPlans"
STANDARD = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
# Planners whose plans have stages of their own, which their trainers train in addition to nnU-Net's configurations.
STAGES = {"MeCascadePlanner": ("3d_me_context", "3d_post_concat")}
FOLDS = (0, 1)
FEATURES = (4, 8, 16)  # of the finest stages; deeper ones have the last
DONE = "integration.json"

Run = Callable[..., None]  # a console command and its arguments


def staged_plans() -> dict[str, tuple[str, str]]:
    """Planner of `STAGES` -> trainer and name of its plans."""
    return {entry.name: registry.planned(entry) for entry in registry.entries("planners") if entry.name in STAGES}


def is_prepared(folder: Path, state: dict[str, Any]) -> bool:
    """Whether `prepare` has been here and the result depends on the same."""
    done = folder / DONE
    return done.is_file() and bool(json.loads(done.read_text(encoding="utf-8")) == state)


def prepare(form: Form, folder: Path, state: dict[str, Any], run: Run) -> None:
    """Plan as nnU-Net does and preprocess, from the start.

    Args:
        form: The data set, written.
        folder: Its folder below nnUNet_preprocessed.
        state: What the result depends on, noted when all is done.
        run: Runs a command.
    """
    shutil.rmtree(folder, ignore_errors=True)
    run("nnUNetv2_extract_fingerprint", "-d", form.number, "-np", 1)
    run("nnUNetv2_plan_experiment", "-d", form.number, *_spacing(form))
    _change(folder / f"{PLANS}.json", lambda plans: _narrow(plans, form.source.patch))
    run("nnUNetv2_preprocess", "-d", form.number, "-c", "2d", "3d_fullres", "3d_lowres", "-np", 1, 1, 1)
    cases = sorted(path.name.partition(".")[0] for path in (folder / "gt_segmentations").iterdir())
    splits = [{"train": cases[(fold + 1) % 2 :: 2], "val": cases[fold::2]} for fold in FOLDS]
    (folder / "splits_final.json").write_text(json.dumps(splits), encoding="utf-8")
    (folder / DONE).write_text(json.dumps(state), encoding="utf-8")


def prepare_stages(form: Form, folder: Path, planner: str, run: Run) -> None:
    """Plan by a planner of `STAGES`, and preprocess where it does not share the data of nnU-Net's plans.

    It does not where a spacing is asked for.

    Args:
        form: The data set, prepared.
        folder: Its folder below nnUNet_preprocessed.
        planner: Name of the planner.
        run: Runs a command.
    """
    name = staged_plans()[planner][1]
    path, done = folder / f"{name}.json", folder / f"{name}-{DONE}"
    if not done.is_file():
        run("nnUNetv2_plan_experiment", "-d", form.number, "-pl", planner, *_spacing(form))
        _change(path, lambda plans: _narrow_stages(plans, STAGES[planner]))
        base = json.loads(path.read_text(encoding="utf-8"))["configurations"]["3d_fullres"]
        if not (folder / base["data_identifier"]).is_dir():
            run("nnUNetv2_preprocess", "-d", form.number, "-plans_name", name, "-c", "3d_fullres", "-np", 1)
        done.touch()


def _spacing(form: Form) -> tuple[str | float, ...]:
    return ("-overwrite_target_spacing", *form.source.spacing) if form.source.spacing else ()


def _change(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    plans = json.loads(path.read_text(encoding="utf-8"))
    change(plans)
    path.write_text(json.dumps(plans, indent=2), encoding="utf-8")


def _narrow(plans: dict[str, Any], patch: tuple[int, ...]) -> None:
    """Few features, batches of two, and the configurations that nnU-Net plans for large images alone."""
    configurations = plans["configurations"]
    if patch:
        configurations["3d_fullres"]["patch_size"] = list(patch)
    configurations["3d_lowres"] = lowres(configurations["3d_fullres"])
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    for name in ("2d", "3d_fullres", "3d_lowres"):
        _few_features(configurations[name])


def _few_features(configuration: dict[str, Any]) -> None:
    arguments = configuration["architecture"]["arch_kwargs"]
    n = arguments["n_stages"]
    arguments["features_per_stage"] = [*FEATURES[:n], *FEATURES[-1:] * (n - len(FEATURES))]
    configuration["batch_size"] = 2


def lowres(fullres: dict[str, Any]) -> dict[str, Any]:
    """A configuration at half the resolution, with at most three stages, whose prediction the cascade takes."""
    planned = deepcopy(fullres)
    arguments = planned["architecture"]["arch_kwargs"]
    n = min(3, arguments["n_stages"])
    for key in ("strides", "kernel_sizes", "n_conv_per_stage"):
        arguments[key] = arguments[key][:n]
    arguments["n_conv_per_stage_decoder"] = arguments["n_conv_per_stage_decoder"][: n - 1]
    arguments["n_stages"] = n
    return {
        **planned,
        "data_identifier": f"{PLANS}_3d_lowres",
        "spacing": [2 * value for value in planned["spacing"]],
        "median_image_size_in_voxels": [value / 2 for value in planned["median_image_size_in_voxels"]],
        "patch_size": [4 * max(2, -(-size // 8)) for size in planned["patch_size"]],
        "next_stage": "3d_cascade_fullres",
    }


def _narrow_stages(plans: dict[str, Any], stages: tuple[str, str]) -> None:
    """A small network whose context is larger than its patch also where the image is small."""
    first, second = (plans["configurations"][name] for name in stages)
    base = plans["configurations"]["3d_fullres"]
    for configuration in (base, first, second):
        _few_features(configuration)
    strides = zip(*base["architecture"]["arch_kwargs"]["strides"], strict=True)
    base["patch_size"] = [4 * prod(along) for along in strides]
    first.update(patch_size=[size * 3 // 2 for size in base["patch_size"]], me_unet={"k": 1.5})
