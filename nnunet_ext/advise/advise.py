"""Plan every method for a data set and a GPU, and sort what comes of it by an aim."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf, isfinite
from pathlib import Path

import torch
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
)

from nnunet_ext import aims, registry
from nnunet_ext.advise.data_set import DataSet
from nnunet_ext.advise.plan import CONFIGURATIONS, Job
from nnunet_ext.advise.records import DEFAULT_PLANNER, Advice, Row
from nnunet_ext.errors import UsageError
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.parallel import mapped
from nnunet_ext.protocols import only_predicts

HOST_TARGET = 8.0  # GB that nnU-Net plans for where nothing is said
RES_ENC_PLANNER = "nnUNetPlannerResEncM"
CHECKPOINTING = "nnUNetTrainerActivationCheckpointing"  # trains nnU-Net's own networks, of any of its planners
_CASCADES = "nnUNetTrainerMeCascade"  # which train no plans but those of their planners


def advise(
    dataset: str,
    aim: aims.Aim,
    *,
    gpu: float | None = None,
    configuration: str | None = None,
    everything: bool = False,
    processes: int = 1,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Advice:
    """Plan and count; what can't be planned is a row with its reason.

    Args:
        dataset: Number or DatasetXXX_Name, whose fingerprint nnU-Net has extracted.
        aim: What the rows are sorted by.
        gpu: GB of 2**30 bytes; None: those of the card that is here, else nnU-Net's default.
        configuration: Of `CONFIGURATIONS`; None: 3d_fullres, of 2D images 2d.
        everything: Switches of methods, and methods on networks with a residual encoder, too.
        processes: How many count at a time.
        on_progress: Called with the number of planners that are done, that of all, and a name.

    Raises:
        UsageError: no such data set, fingerprint or configuration; a size that can't be.
    """
    target, said = _target(gpu)
    data = DataSet.find(dataset)
    name = _configuration(data, configuration)
    with tempfile.TemporaryDirectory() as folder:
        data.write(Path(folder))
        jobs = [
            Job(
                folder=Path(folder),
                dataset=data.name,
                configuration=name,
                target=target,
                planner=planner,
                trainers=trainers,
            )
            for planner, trainers in _jobs(aim, everything)
            if trainers
        ]
        rows: list[Row] = []
        on_progress(0, len(jobs), jobs[0].planner)
        for done, (job, found) in enumerate(zip(jobs, mapped(_rows, jobs, processes), strict=True), start=1):
            rows += found
            on_progress(done, len(jobs), job.planner)
    default = next(row for row in rows if row.is_default)
    if default.reason:
        raise UsageError(
            f"{name} of {data.name} can't be planned by nnU-Net itself ({default.reason}): give another -c, or correct "
            "the data set."
        )
    advice = Advice(
        dataset=data.name, number=data.number, configuration=name, target=target, gpu=said, aim=aim, rows=rows
    )
    return replace(advice, rows=sorted(rows, key=lambda row: inf if row.reason else advice.value(row)))


def _rows(job: Job) -> list[Row]:
    return job.rows()


def _target(gpu: float | None) -> tuple[float, str]:
    """GB, and where they come from."""
    if gpu is not None:
        if not (isfinite(gpu) and gpu > 0):
            raise UsageError(f"--gpu must be the GB of the card, a positive number, got {gpu:g}: correct it.")
        return gpu, "--gpu"
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return int(10 * found.total_memory / GIB) / 10, found.name
    return HOST_TARGET, "no GPU is here, so nnU-Net's own default: --gpu N names a card"


def _configuration(data: DataSet, asked: str | None) -> str:
    flat = all(1 in shape for shape in data.fingerprint["shapes_after_crop"])
    if asked is None:
        return "2d" if flat else "3d_fullres"
    if asked not in CONFIGURATIONS:
        raise UsageError(
            f"-c must be {', '.join(CONFIGURATIONS)}, which planners plan, got {asked}: choose one of them."
        )
    if flat and asked != "2d":
        raise UsageError(f"the images of {data.name} are 2D, got -c {asked}: leave it out, or give -c 2d.")
    return asked


def _jobs(aim: aims.Aim, everything: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Planners with the trainers of their plans.

    The same patch in less memory means nnU-Net's own plans; else a trainer has those of its planners, a rival, and one
    without planner, nnU-Net's.
    """
    planners = {name: found for name in registry.names("planners") if (found := _trainer_of(name, everything))}
    trainers = [name for name in (aims.DEFAULT, *registry.names("trainers")) if _takes_part(name, everything)]
    if aim == "memory":
        yield DEFAULT_PLANNER, tuple(name for name in trainers if not name.startswith(_CASCADES))
        yield RES_ENC_PLANNER, (aims.DEFAULT, CHECKPOINTING)
        return
    belongs = {name: _planned_by(name) for name in trainers}
    yield DEFAULT_PLANNER, tuple(n for n in trainers if _is_rival(n) or belongs[n] not in planners.values())
    yield RES_ENC_PLANNER, (aims.DEFAULT,)
    for planner, trainer in planners.items():
        yield planner, tuple(name for name in trainers if belongs[name] == trainer)


def _is_rival(trainer: str) -> bool:
    method = aims.of(trainer)
    return method is not None and method.standing == "rival"


def _planned_by(trainer: str) -> str:
    """The trainer whose planners plan for this one."""
    method = aims.of(trainer)
    return method.plans_of if method and method.plans_of else trainer


def _trainer_of(planner: str, everything: bool) -> str:
    """The trainer that a planner plans for; empty where it takes no part, can't be loaded or does not say."""
    try:
        found = registry.resolve("planners", planner)
    except registry.RegistryError:
        return ""
    trainer = str(getattr(found, "trainer", ""))
    method = aims.of(trainer)
    is_variant = method is not None and not _is_rival(trainer) and issubclass(found, ResEncUNetPlanner)
    return "" if is_variant and not everything else trainer


def _takes_part(trainer: str, everything: bool) -> bool:
    """Whether it trains, and can be loaded."""
    method = aims.of(trainer)
    if method is not None:
        return everything or method.standing != "research"
    try:
        return not only_predicts(trainer_class(trainer))
    except UsageError:
        return False
