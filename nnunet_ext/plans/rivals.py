"""What nnU-Net's own network gets for the same data and target, and what of a larger patch is owed to the method.

nnU-Net plans by a rule of thumb that leaves part of the target empty. So its network is planned twice: by nnU-Net
(*default*), and by counted memory, as everything here is (*filled*). From default to filled the filling grows and
nothing else; from filled to what a planner chose, the method.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
    nnUNetPlannerResEncM,
)

from nnunet_ext.memory.tracker import GIB

if TYPE_CHECKING:
    from nnunet_ext.plans.memory_planner import MemoryPlanner

Asked = tuple[Any, Any, float]  # spacing, median shape and voxels of the data set: what nnU-Net asks a planner for
LOWRES = "3d_lowres"  # of nnU-Net's cascade the first stage
FREES = 1.05  # voxels per byte, over those of the filled network, from which on a method is said to free memory


@dataclass(frozen=True)
class Planned:
    """A configuration and the GB of 2**30 bytes that its training is expected to need."""

    plan: dict[str, Any]
    expected: float

    @property
    def voxels(self) -> int:
        """Of a batch."""
        return int(self.plan["batch_size"]) * prod(self.plan["patch_size"])

    def entry(self) -> dict[str, Any]:
        """For the plans."""
        sizes = {key: self.plan[key] for key in ("patch_size", "batch_size")}
        return {**sizes, "expected_GB": round(self.expected, 3)}


@dataclass(frozen=True, kw_only=True)
class Rivals:
    """nnU-Net's own network for the data and the target of a configuration.

    Args:
        name: What the default plan is called.
        default: As nnU-Net plans it.
        filled: As counted memory plans it; None where nothing fits the target.
    """

    name: str
    default: Planned
    filled: Planned | None

    def split(self, voxels: float) -> tuple[float, float, float]:
        """Voxels of a batch over those of default; what of this factor is filling; and what is the method."""
        default, filled = self.default.voxels, (self.filled or self.default).voxels
        return voxels / default, filled / default, voxels / filled

    def entry(self, planned: Planned) -> dict[str, Any]:
        """For the plans."""
        _, filling, method = self.split(planned.voxels)
        return {
            "default": self.default.entry(),
            "filled": self.filled and self.filled.entry(),
            "voxels_by_filling": round(filling, 3),
            "voxels_by_method": round(method, 3),
        }

    def sentences(self, planned: Planned) -> Iterator[str]:
        """What of the voxels of a batch is filling, and what the method."""
        yield self._owed(planned)
        noted = planned.plan.get("me_unet")
        if noted and noted["standard_patch_size"] != list(planned.plan["patch_size"]):
            standard = int(planned.plan["batch_size"]) * prod(noted["standard_patch_size"])
            times, filling, method = self.split(standard)
            yield f"{times:.2f}x without the context: {filling:.2f}x and {method:.2f}x."

    def _owed(self, planned: Planned) -> str:
        times, filling, method = self.split(planned.voxels)
        start = f"{times:.2f}x the voxels of {self.name}"
        if self.filled is None:
            return f"{start}, all of it the method: without it no patch fits the target."
        word = "filling" if filling >= 1 else "keeping to"
        if planned is self.filled:
            return f"{start}." if filling == 1 else f"{start}, all of it {word} the target."
        start = f"{start}: {filling:.2f}x is {word} the target, {method:.2f}x the method"
        if method * self.filled.expected / planned.expected <= FREES:
            return f"{start}, which frees no memory."
        if planned.voxels == self.filled.voxels:
            return f"{start}, which needs {planned.expected:.2f} GB instead of {self.filled.expected:.2f} GB."
        return f"{start}."


def host_of(planner: MemoryPlanner) -> ExperimentPlanner:
    """The planner of nnU-Net's that plans a network as a planner of this package does, plain or with ResEnc M."""
    kind = nnUNetPlannerResEncM if isinstance(planner, ResEncUNetPlanner) else ExperimentPlanner
    with warnings.catch_warnings():
        # The preset is made for one target.
        warnings.filterwarnings("ignore", message=".*non-standard gpu_memory_target_in_gb")
        return kind(planner.dataset_name, planner.UNet_vram_target_GB)


def planned_by(host: ExperimentPlanner, asked: Asked, sizes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The configuration that a planner of nnU-Net's makes, whose networks are built without their weights.

    Args:
        host: The planner.
        asked: What it is asked for.
        sizes: Of networks that it has built before, added to.
    """
    spacing, median_shape, voxels = asked
    known = {} if sizes is None else sizes
    with torch.device("meta"):  # it wants to know their sizes
        plan: dict[str, Any] = host.get_plans_for_configuration(spacing, median_shape, "default", voxels, known)
    return {**plan, "patch_size": [int(n) for n in plan["patch_size"]], "batch_size": int(plan["batch_size"])}


class Hosts:
    """Plans nnU-Net's own network, plain or with a residual encoder as that of a planner.

    Args:
        planner: A planner of this package; where it plans nnU-Net's own network, *filled* is its choice.
    """

    def __init__(self, planner: MemoryPlanner) -> None:
        # Here, because they are planners too.
        from nnunet_ext.plans.counted_memory_planner import CountedMemoryPlanner
        from nnunet_ext.plans.counted_memory_res_enc_planner import CountedMemoryResEncPlanner

        res_enc = isinstance(planner, ResEncUNetPlanner)
        self._name = "default ResEnc M" if res_enc else "default"
        counted = CountedMemoryResEncPlanner if res_enc else CountedMemoryPlanner
        data, target = planner.dataset_name, planner.UNet_vram_target_GB
        self._is_filled = type(planner) is counted
        self._counted: MemoryPlanner = planner if self._is_filled else counted(data, target)
        self._host = host_of(planner)

    def rivals(self, planned: Planned, asked: Asked) -> Rivals:
        """Plan for the data of a configuration; for the second stage of nnU-Net's cascade one too.

        Args:
            planned: What the planner chose.
            asked: What nnU-Net asked it for.
        """
        second = planned.plan.get("previous_stage") == LOWRES
        default = self.default(asked, second)  # from which on the filled one is searched
        filled = planned if self._is_filled else self._filled(asked, second)
        return Rivals(name=self._name, default=default, filled=filled)

    def default(self, asked: Asked, second: bool = False) -> Planned:
        """What nnU-Net's own planner makes for the same target.

        Args:
            asked: What it is asked for.
            second: Count the second stage of its cascade.
        """
        plan = planned_by(self._host, asked)
        return self._known({**plan, "previous_stage": LOWRES} if second else plan, asked)

    def _filled(self, asked: Asked, second: bool) -> Planned | None:
        spacing, median_shape, voxels = asked
        try:
            plan = self._counted.get_plans_for_configuration(spacing, median_shape, "filled", voxels, {})
            plan = self._counted.second_stage(plan) if second else plan
        except ValueError:  # nothing fits
            return None
        return self._known(plan, asked)

    def _known(self, plan: dict[str, Any], asked: Asked) -> Planned:
        return Planned(plan, self._counted.measured(plan, asked).expected / GIB)
