"""Patch, batch and memory that every planner chooses for synthetic data sets and GPUs, compared with default nnU-Net.

Each plan's step is counted again, sample by sample, and must lie under the target, and within 10 % of it unless
image or data set are the limit. No GPU and no images are needed.

usage: python benchmarks/planners.py -o docs/benchmarks/2026-11-21-planners    # the full grid
       python benchmarks/planners.py --table                                   # the table of docs/how-to/plan-memory.md
       python benchmarks/planners.py --presets                                 # nnU-Net's presets, there too
       python benchmarks/planners.py --random 40                               # random data sets, planners and GPUs
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from nnunet_ext.escaping import markdown_table

TARGETS = (4.0, 8.0, 11.0, 24.0, 80.0)
DEFAULT, RES_ENC = "ExperimentPlanner", "nnUNetPlannerResEncM"
# nnU-Net's own planners, with those that fill the target with the same network and trainer, and recompute in it.
COUNTED = {DEFAULT: "CountedMemoryPlanner", RES_ENC: "CountedMemoryResEncPlanner"}
RECOMPUTED = {DEFAULT: "ActivationCheckpointingPlanner", RES_ENC: "ActivationCheckpointingResEncPlanner"}
NAMES = {
    DEFAULT: "default nnU-Net",
    COUNTED[DEFAULT]: f"default filled, `{COUNTED[DEFAULT]}`",
    RES_ENC: "default ResEnc M",
    COUNTED[RES_ENC]: f"default ResEnc M filled, `{COUNTED[RES_ENC]}`",
}
TABLE_BEGIN, TABLE_END = "<!-- planners:begin -->", "<!-- planners:end -->"


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """A data set of equal images.

    Args:
        title: Name in tables.
        spacing: Millimetres per axis.
        shape: Voxels per axis.
        channels, classes: Numbers of channels, and of labels with background.
        cases: Number of images.
    """

    title: str
    spacing: tuple[float, ...]
    shape: tuple[int, ...]
    channels: int = 1
    classes: int = 3
    cases: int = 100


FINGERPRINTS = {
    "ct": Fingerprint(title="isotropic CT", spacing=(1.0, 1.0, 1.0), shape=(400, 400, 400)),
    "mri": Fingerprint(title="anisotropic MRI", spacing=(5.0, 0.8, 0.8), shape=(40, 512, 512), channels=1, classes=4),
    "tiny": Fingerprint(title="tiny", spacing=(1.0, 1.0, 1.0), shape=(36, 50, 35), cases=260),
    "microct": Fingerprint(
        title="micro-CT", spacing=(0.01, 0.01, 0.01), shape=(1072, 470, 470), channels=1, classes=3, cases=20
    ),
    "2d": Fingerprint(title="2D", spacing=(1.0, 1.0), shape=(512, 512), channels=3, classes=2, cases=2000),
    "4 channels": Fingerprint(
        title="4 channels", spacing=(1.0, 1.0, 1.0), shape=(140, 170, 137), channels=4, classes=4, cases=400
    ),
}
IN_TABLE = ("ct", "mri", "2d")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One plan; GB are 2**30 bytes."""

    planner: str
    fingerprint: str
    target: float
    patch: tuple[int, ...]
    batch: int
    expected: float
    counted: float
    limit: str
    standard_patch: tuple[int, ...] | None
    seconds: float

    @property
    def voxels(self) -> int:
        """Of a batch."""
        return self.batch * prod(self.patch)

    @property
    def is_true(self) -> bool:
        """Whether the plan keeps what the planner promises."""
        full = self.counted >= 0.9 * self.target or self.limit in ("image", "data set", "batch of nnU-Net")
        return self.counted <= self.target and full and abs(self.expected / self.counted - 1) <= 0.05


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Folders of nnU-Net that planning reads, in a temporary place."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{name}"] = str(Path(folder) / name)
        yield Path(folder)


def write_dataset(folder: Path, number: int, fingerprint: Fingerprint) -> None:
    """Write dataset.json and dataset_fingerprint.json, no images."""
    name = f"Dataset{number:03d}_planned"
    raw, preprocessed = folder / "raw" / name, folder / "preprocessed" / name
    for path in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        path.mkdir(parents=True, exist_ok=True)
    cases = range(fingerprint.cases)
    content = {
        "channel_names": {str(i): "MRI" for i in range(fingerprint.channels)},
        "labels": {"background": 0, **{f"class {i}": i for i in range(1, fingerprint.classes)}},
        "numTraining": fingerprint.cases,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
        "dataset": {f"{i}": {"images": [f"{i}_0000.nii.gz"], "label": f"{i}.nii.gz"} for i in cases},
    }
    (raw / "dataset.json").write_text(json.dumps(content))
    shape, spacing = fingerprint.shape, fingerprint.spacing
    if len(shape) == 2:
        shape, spacing = (1, *shape), (999.0, *spacing)
    found = {
        "spacings": [spacing] * fingerprint.cases,
        "shapes_after_crop": [shape] * fingerprint.cases,
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {},
    }
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(found))


def question(fingerprint: Fingerprint) -> tuple[list[float], list[float], float]:
    """What nnU-Net asks a planner for: spacing, shape, and voxels of all images."""
    shape = [float(n) for n in fingerprint.shape]
    return list(fingerprint.spacing), shape, prod(shape) * fingerprint.cases


def title(fingerprint: Fingerprint) -> str:
    """Name and shape."""
    return f"{fingerprint.title} {'x'.join(map(str, fingerprint.shape))}"


def planned(planner: str, number: int, fingerprint: Fingerprint, target: float) -> tuple[Any, dict[str, Any]]:
    """A planner, and its configuration of full resolution."""
    from nnunet_ext import registry

    found = registry.resolve("planners", planner)(number, target)
    spacing, shape, voxels = question(fingerprint)
    return found, found.get_plans_for_configuration(spacing, shape, "planned", voxels, {})


def grid_row(planner: str, key: str, number: int, target: float) -> Row:
    """Plan, and count the plan's step again."""
    from nnunet_ext.memory.count import count_memory, training_memory
    from nnunet_ext.memory.tracker import GIB

    fingerprint = FINGERPRINTS[key]
    start = time.perf_counter()
    found, plan = planned(planner, number, fingerprint, target)
    seconds = time.perf_counter() - start
    # Sample by sample, unless that takes minutes; tests compare both.
    counting = count_memory if plan["batch_size"] <= 16 else lambda s, t, _: training_memory(s, t)
    trainings = found.settings_of(plan)
    counted = max(counting(s, found.trainer, plan["batch_size"]).expected for s in trainings) / GIB
    noted = plan["memory"]
    standard = plan.get("me_unet", {}).get("standard_patch_size")
    return Row(
        planner=planner,
        fingerprint=key,
        target=target,
        patch=tuple(plan["patch_size"]),
        batch=plan["batch_size"],
        expected=noted["expected_GB"],
        counted=round(counted, 3),
        limit=noted["limit"],
        standard_patch=tuple(standard) if standard else None,
        seconds=round(seconds, 1),
    )


def default_row(planner: str, key: str, number: int, target: float) -> Row:
    """What nnU-Net's own planner chooses for the network that a counted one plans, and the memory that it needs."""
    from nnunet_ext import registry
    from nnunet_ext.plans.rivals import Hosts

    hosts = Hosts(registry.resolve("planners", COUNTED[planner])(number, target))
    found = hosts.default(question(FINGERPRINTS[key]))
    return Row(
        planner=planner,
        fingerprint=key,
        target=target,
        patch=tuple(found.plan["patch_size"]),
        batch=found.plan["batch_size"],
        expected=round(found.expected, 3),
        counted=round(found.expected, 3),
        limit="",
        standard_patch=None,
        seconds=0.0,
    )


def in_order(planners: Sequence[str]) -> list[str]:
    """First what nnU-Net plans of its own networks, the same filled, and with their activations recomputed."""
    first = [name for default in COUNTED for name in (default, COUNTED[default], RECOMPUTED[default])]
    return [*(name for name in first if name in (*planners, *COUNTED)), *(n for n in planners if n not in first)]


def grid(planners: Sequence[str], keys: Sequence[str], targets: Sequence[float]) -> Iterator[Row]:
    """Default nnU-Net, then every planner, for each data set and target."""
    with workspace() as folder:
        for number, key in enumerate(keys, start=1):
            write_dataset(folder, number, FINGERPRINTS[key])
            for target in targets:
                for planner in in_order(planners):
                    row = default_row if planner in COUNTED else grid_row
                    yield row(planner, key, number, target)


def presets(key: str, number: int) -> str:
    """Table of what plans of nnU-Net's own planners need with its trainer, and with recomputed activations."""
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import (
        residual_encoder_unet_planners as res_enc,
    )

    from nnunet_ext import registry
    from nnunet_ext.memory.count import training_memory
    from nnunet_ext.memory.tracker import GIB
    from nnunet_ext.plans.rivals import planned_by

    made = {f"ResEnc {size}": getattr(res_enc, f"nnUNetPlannerResEnc{size}") for size in ("M", "L", "XL")}
    trainers = [registry.resolve("planners", planner[DEFAULT]).trainer for planner in (COUNTED, RECOMPUTED)]
    asked, lines = question(FINGERPRINTS[key]), []
    reader = registry.resolve("planners", COUNTED[DEFAULT])(number)
    for name, planner in {"default": ExperimentPlanner, **made}.items():
        host = planner(number)
        plan = planned_by(host, asked)
        needs = [training_memory(reader.setting_of(plan), trainer).expected / GIB for trainer in trainers]
        sizes = f"{'x'.join(map(str, plan['patch_size']))}, {plan['batch_size']}"
        target = f"{name}, {host.UNet_vram_target_GB:g} GB"
        lines.append([target, sizes, *(f"{n:.1f} GB" for n in needs)])
    return markdown_table(["nnU-Net's plans", title(FINGERPRINTS[key]), *(f"`{name}`" for name in trainers)], lines)


def random_rows(planners: Sequence[str], count: int, seed: int) -> Iterator[Row]:
    """Plans of random data sets, 2D and 3D, for random GPUs; the seed makes them the same again."""
    chosen = random.Random(seed)
    with workspace() as folder:
        for number in range(1, count + 1):
            dim = chosen.choice((2, 3, 3, 3))
            thick = chosen.choice((1.0, 1.0, chosen.uniform(1.0, 8.0)))
            extent = [chosen.uniform(30, 700) * (3 if dim == 2 else 1) for _ in range(dim)]
            spacing = (thick, 1.0, 1.0)[-dim:]
            shape = tuple(max(8, round(mm / step)) for mm, step in zip(extent, spacing, strict=True))
            channels, classes = chosen.choice((1, 1, 2, 4)), chosen.choice((2, 3, 5, 16, 60))
            key = f"{'x'.join(map(str, shape))}, {thick:.1f} mm, {channels} channels, {classes} classes"
            FINGERPRINTS[key] = Fingerprint(
                title=key,
                spacing=spacing,
                shape=shape,
                channels=channels,
                classes=classes,
                cases=chosen.choice((20, 100, 1000)),
            )
            write_dataset(folder, number, FINGERPRINTS[key])
            target = chosen.choice((4.0, 6.0, 8.0, 11.0, 16.0, 24.0, 40.0, 80.0))
            yield grid_row(chosen.choice(planners), key, number, target)


def size(found: Row) -> str:
    """Patch and batch as text, for meU-net with the standard patch."""
    text = f"{'x'.join(map(str, found.patch))}, {found.batch}"
    inner = found.standard_patch
    return f"{text} (P {'x'.join(map(str, inner))})" if inner and inner != found.patch else text


def gain(found: Row, rows: Sequence[Row]) -> str:
    """Voxels of a batch over those of the same network filled without a method, as text; nothing where not known."""
    filled = COUNTED[RES_ENC if "ResEnc" in found.planner else DEFAULT]
    of_same = [r for r in rows if (r.planner, r.fingerprint, r.target) == (filled, found.fingerprint, found.target)]
    return f", {found.voxels / of_same[0].voxels:.2f}x" if of_same else ""


def comparison(rows: Sequence[Row]) -> str:
    """Table of patch and batch, nnU-Net's own network against each planner."""
    keys = list(dict.fromkeys(found.fingerprint for found in rows))
    titles = [title(FINGERPRINTS[key]) for key in keys]
    lines = []
    for planner in dict.fromkeys(found.planner for found in rows):
        cells = [
            f"{size(found)}: {found.counted:.1f} GB{gain(found, rows)}"
            for key in keys
            for found in rows
            if (found.planner, found.fingerprint) == (planner, key)
        ]
        lines.append([NAMES.get(planner, f"`{planner}`"), *cells])
    return markdown_table(["planner", *titles], lines)


def document(rows: Sequence[Row], command: str) -> str:
    """All rows, those that break a promise marked."""
    lines = [
        "# Planned and counted memory",
        "",
        f"`{command}`",
        "",
        "GB are 2**30 bytes. *expected* is what the planner prints, *counted* the peak of the planned step with its",
        "allowance, counted again; default nnU-Net's plans are counted alike. Seconds on one busy core.",
        "",
    ]
    cells = []
    for found in rows:
        mark = "" if found.planner in COUNTED or found.is_true else " (not as promised)"
        share = found.counted / found.target
        figures = (f"{n:.2f}" for n in (found.expected, found.counted, share))
        where = (found.fingerprint, f"{found.target:g}", f"{found.planner}{mark}", size(found))
        cells.append([*where, *figures, found.limit, f"{found.seconds:.1f}"])
    header = ["data set", "target", "planner", "patch, batch", "expected", "counted", "share", "limit", "seconds"]
    return "\n".join([*lines, markdown_table(header, cells), ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the grid or print the table of docs/how-to/plan-memory.md; return 1 where a plan breaks a promise."""
    from nnunet_ext import registry

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planners", nargs="+", default=list(registry.names("planners")))
    parser.add_argument("--data", nargs="+", choices=FINGERPRINTS, default=list(FINGERPRINTS))
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument("--table", action="store_true", help="the table of docs/how-to/plan-memory.md: 8 GB")
    parser.add_argument("--presets", action="store_true", help="the table of nnU-Net's own presets there")
    parser.add_argument("--random", type=int, metavar="N", help="N random data sets instead")
    parser.add_argument("--seed", type=int, default=0, help="of the random data sets")
    parser.add_argument("-o", type=Path, dest="output", help="folder for planners.json and planners.md")
    args = parser.parse_args(argv)
    if args.table:
        with contextlib.redirect_stdout(io.StringIO()):
            rows = list(grid(args.planners, IN_TABLE, (8.0,)))
        print(comparison(rows))
        return 0
    if args.presets:
        with workspace() as folder:
            write_dataset(folder, 1, FINGERPRINTS["ct"])
            print(presets("ct", 1))
        return 0
    rows = []
    command = " ".join(["python benchmarks/planners.py", *(sys.argv[1:] if argv is None else argv)])
    fixed = grid(args.planners, args.data, args.targets)
    for found in random_rows(args.planners, args.random, args.seed) if args.random else fixed:
        rows.append(found)
        print(found, flush=True)
        if args.output is not None:  # after every row, so that an interruption leaves what is done
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / "planners.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
            (args.output / "planners.md").write_text(document(rows, command))
    return int(any(found.planner not in COUNTED and not found.is_true for found in rows))


if __name__ == "__main__":
    sys.exit(main())
