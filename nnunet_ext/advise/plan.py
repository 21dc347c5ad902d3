"""Plans of one planner and what its trainers need, counted on shapes; nothing is written but to a folder of its own."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
    nnUNetPlannerResEncM,
)
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_ext import aims, registry
from nnunet_ext.advise.data_set import planners_in
from nnunet_ext.advise.records import Row
from nnunet_ext.benchmark.counting import tiles
from nnunet_ext.memory.count import training_memory, training_operations
from nnunet_ext.memory.network import count_parameters, deployed, measure_size
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.plans.counted_memory_planner import CountedMemoryPlanner
from nnunet_ext.plans.memory_planner import MemoryPlanner
from nnunet_ext.plans.patch_shapes import image_size
from nnunet_ext.printable import one_line
from nnunet_ext.trainers.me_unet import MeUNetTrainerMixin, plan_standard_patch

HOSTS = {planner.__name__: planner for planner in (ExperimentPlanner, nnUNetPlannerResEncM)}  # nnU-Net's own
# Configuration -> those that have to be planned for it.
CONFIGURATIONS = {"2d": ("2d",), "3d_fullres": ("3d_fullres",), "3d_lowres": ("3d_fullres", "3d_lowres")}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A planner, and the trainers that train with its plans.

    Args:
        folder: Holds `raw` and `preprocessed` with the data set.
        dataset: Its name there.
        configuration: One of `CONFIGURATIONS`.
        target: GB.
        planner: Name, registered or in `HOSTS`.
        trainers: Names.
    """

    folder: Path
    dataset: str
    configuration: str
    target: float
    planner: str
    trainers: tuple[str, ...]

    def rows(self) -> list[Row]:
        """Plan, and count for each trainer; a row that can't be says why."""
        with planners_in(self.folder), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # both speak to somebody who plans
            try:
                planner = _dry(self.planner, self.configuration)(self.dataset, gpu_memory_target_in_gb=self.target)
                plan = planner.plan_experiment()["configurations"].get(self.configuration)
            except Exception as error:  # of any planner, also a third party's
                return [self._without(trainer, one_line(error)) for trainer in self.trainers]
            if plan is None:
                reason = f"plans no {self.configuration} for these images"
                return [self._without(trainer, reason) for trainer in self.trainers]
            recursive_fix_for_json_export(plan)
            return [self._row(trainer, planner, plan) for trainer in self.trainers]

    def _without(self, trainer: str, reason: str) -> Row:
        return Row(trainer=trainer, planner=self.planner, reason=reason)

    def _row(self, trainer: str, planner: ExperimentPlanner, plan: Mapping[str, Any]) -> Row:
        try:
            return Row(
                trainer=trainer,
                planner=self.planner,
                plans=planner.plans_identifier,
                patch=tuple(map(int, plan["patch_size"])),
                batch=int(plan["batch_size"]),
                is_plain=len(plan["patch_size"]) == 3 and not isinstance(planner, ResEncUNetPlanner),
                **self._counted(trainer, planner, dict(plan)),
            )
        except Exception as error:  # of any trainer
            return self._without(trainer, one_line(error))

    def _counted(self, trainer: str, planner: ExperimentPlanner, plan: dict[str, Any]) -> dict[str, Any]:
        ours = planner if isinstance(planner, MemoryPlanner) else CountedMemoryPlanner(self.dataset, self.target)
        settings = ours.settings_of(plan)
        image = image_size(list(plan["median_image_size_in_voxels"])[-len(plan["patch_size"]) :])
        networks = [
            measure_size(deployed(s.builder(trainer, deep_supervision=False)), s.input_channels, s.patch_size)
            for s in settings
        ]
        passes = [tiles(image, s.patch_size) for s in settings]
        return {
            "image": image,
            "standard_patch": _standard_patch(trainer, settings[0]),
            "expected": max(training_memory(s, trainer).expected for s in settings),
            "step_operations": sum(training_operations(s, trainer) for s in settings),
            "parameters": sum(count_parameters(s.training_builder(trainer)) for s in settings),
            "parameters_deployed": sum(network.parameters for network in networks),
            "case_operations": sum(n * network.macs for n, network in zip(passes, networks, strict=True)),
            "case_voxels": sum(n * prod(s.patch_size) for n, s in zip(passes, settings, strict=True)),
            "has_own_weights": _has_own_weights(trainer, settings[0]),
        }


def _standard_patch(trainer: str, setting: Setting) -> tuple[int, ...] | None:
    """Of meU-net, where it is smaller than the patch of the plans."""
    found = trainer_class(trainer)
    if not issubclass(found, MeUNetTrainerMixin):
        return None
    standard = plan_standard_patch(setting.configuration_manager, found.k)
    return None if standard == setting.patch_size else standard


def _has_own_weights(trainer: str, setting: Setting) -> bool:
    method = aims.of(trainer)
    if method is None or method.standing != "rival":
        return False
    with FakeTensorMode():
        ours, theirs = (setting.builder(name)().state_dict() for name in (trainer, aims.DEFAULT))
    return {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in theirs.items()}


def _dry(name: str, configuration: str) -> Any:
    """The planner, without other configurations than this one, and without plans on the disk."""
    planner: Any = HOSTS[name] if name in HOSTS else registry.resolve("planners", name)
    wanted = tuple(f"_{other}" for other in CONFIGURATIONS[configuration])

    class Dry(planner):
        def get_plans_for_configuration(self, spacing: Any, shape: Any, identifier: str, *rest: Any) -> Any:
            if not identifier.endswith(wanted):
                return {"patch_size": [*shape], "spacing": spacing}  # covers the image: nothing follows from it
            with _without_weights(self):
                return super().get_plans_for_configuration(spacing, shape, identifier, *rest)

        def save_plans(self, plans: Any) -> None:
            pass

    Dry.__name__ = planner.__name__  # which its errors say
    return Dry


@contextlib.contextmanager
def _without_weights(planner: ExperimentPlanner) -> Iterator[None]:
    """nnU-Net builds the networks of its candidates; ours counts them on shapes."""
    with contextlib.nullcontext() if isinstance(planner, MemoryPlanner) else torch.device("meta"):
        yield
