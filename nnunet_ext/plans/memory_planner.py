"""What the planners of this package share: they plan by the memory that a training step really needs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from torch import nn

from nnunet_ext import registry
from nnunet_ext.memory.count import TrainingMemory, training_memory
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.plans.memory_search import Candidate, Choice, MemorySearch
from nnunet_ext.plans.patch_shapes import image_size, patch_shapes
from nnunet_ext.plans.planned_report import BATCH, memory_entry, overwritten, report
from nnunet_ext.plans.rivals import LOWRES, Asked, host_of, planned_by
from nnunet_ext.plans.shared_data import settled

# Voxels of a batch that default nnU-Net trains in 8 GB.
_VOXELS_PER_GB = {2: 12 * 512**2 / 8, 3: 2 * 128**3 / 8}
# With two, nnU-Net's weights of deep supervision add up to nothing.
_FEWEST_STAGES = 3
_CASCADE = "3d_cascade_fullres"
_FITTED = ("patch_size", "batch_size", "architecture", "memory", "me_unet")


class MemoryPlanner(ExperimentPlanner):
    """Plans the largest patch, up to the whole image, then the largest batch, that train in the GPU memory target.

    Everything but patch, batch and topology is nnU-Net's own planning. Memory is that of the step of `trainer`,
    counted by `memory.count`, with its allowance for the GPU; 1 GB of the target is 2**30 bytes. A batch holds at
    most 5 % of the data set's voxels and at most as many patches as nnU-Net's own planner takes for the same target:
    an epoch has a fixed number of steps, whose time grows with the batch. Each configuration notes under ``memory``
    what is expected and what limits it. Preprocessed data of `nnUNetPlans` is reused where it was made in the same
    way. Images of one voxel along an axis are planned as slices across it.

    Attributes:
        network_class: Network that is planned.
        network_options: Options of the network, written into the plans.
        trainer: Name of the trainer whose step is planned for.
        default_plans_name: Name of the plans where none is asked for.
    """

    network_class: type[nn.Module]
    network_options: Mapping[str, Any] = {}
    trainer: str = registry.CORE_TRAINER
    default_plans_name: str

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        if not gpu_memory_target_in_gb > 0:
            raise ValueError(
                f"The GPU memory target must be a positive number of GB, got {gpu_memory_target_in_gb}: use for "
                "example -gpu_memory_target 8."
            )
        with warnings.catch_warnings():
            # nnU-Net's ResEnc presets are made for one target, ours plan for any.
            warnings.filterwarnings("ignore", message=".*non-standard gpu_memory_target_in_gb")
            super().__init__(
                dataset_name_or_id,
                gpu_memory_target_in_gb,
                preprocessor_name,
                plans_name or self.default_plans_name,
                overwrite_target_spacing,
                suppress_transpose,
            )
        self.UNet_class = self.network_class
        # Of each configuration: what nnU-Net asked for, by the identifier of its data.
        self._asked: dict[str, Asked] = {}
        self._known: dict[tuple[int, bool], dict[tuple[str, int], Choice]] = {}
        self._sizes: dict[str, Any] = {}  # of nnU-Net's own networks

    def determine_transpose(self) -> tuple[list[int], list[int]]:
        """As nnU-Net, but an axis of one voxel comes first: nnU-Net then plans no 3D, which it could not train.

        Raises:
            ValueError: images of one voxel along two axes, or axes that may not be exchanged.
        """
        forward, backward = super().determine_transpose()
        flat = [axis for axis, n in enumerate(self._median_shape()) if n == 1]
        if not flat or flat == [forward[0]]:
            return forward, backward
        if len(flat) > 1 or self.suppress_transpose:
            raise ValueError(
                f"{type(self).__name__} plans 3D images, or 2D ones whose single axis it may put first, got a typical "
                f"size of {[int(n) for n in self._median_shape()]} voxels"
                f"{' without transposing' if self.suppress_transpose else ''}: correct the images."
            )
        print(f"The images have one voxel along axis {flat[0]}: they are planned in 2D, as slices across it.")
        forward = [*flat, *(axis for axis in range(3) if axis not in flat)]
        return forward, [forward.index(axis) for axis in range(3)]

    def _median_shape(self) -> Any:
        """Voxels per axis of a typical image at the target spacing, as nnU-Net counts them."""
        spacing = self.determine_fullres_target_spacing()
        found = zip(self.dataset_fingerprint["shapes_after_crop"], self.dataset_fingerprint["spacings"], strict=True)
        return np.median([compute_new_shape(shape, own, spacing) for shape, own in found], 0)

    def generate_data_identifier(self, configuration_name: str) -> str:
        """That of nnU-Net's default plans where nothing else is asked for; `save_plans` looks whether they agree."""
        same_data = self.overwrite_target_spacing is None and self.preprocessor_name == "DefaultPreprocessor"
        if configuration_name in ("2d", "3d_fullres") and same_data:
            return f"nnUNetPlans_{configuration_name}"
        return ExperimentPlanner.generate_data_identifier(self, configuration_name)

    def static_estimate_VRAM_usage(self, *args: Any, **kwargs: Any) -> float:  # noqa: N802
        """Next to nothing, so that nnU-Net's own search ends at once: this one follows."""
        return 1.0

    def get_plans_for_configuration(
        self,
        spacing: Any,
        median_shape: Sequence[float],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[str, Any],
    ) -> dict[str, Any]:
        """Plan as nnU-Net does, then choose patch and batch by memory.

        Raises:
            ValueError: not even the smallest patch fits the target.
        """
        asked = (spacing, median_shape, approximate_n_voxels_dataset)
        self._asked[data_identifier] = asked
        plan = super().get_plans_for_configuration(
            spacing, median_shape, data_identifier, approximate_n_voxels_dataset, {}
        )
        plan["architecture"]["arch_kwargs"].update(self.network_options)
        return self._fitted(plan, asked, draft=data_identifier.endswith(LOWRES))

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Fit the cascade too, whose input has more channels; print what was chosen and why; write as nnU-Net does.

        Data of other plans that were made in another way are left to them. Plans of this name for another target are
        overwritten, which is said.
        """
        configurations = plans["configurations"]
        host = configurations.get("3d_fullres", {})
        if _CASCADE in configurations and "memory" in host:  # meU-net's cascade plans its own stages
            fitted = self.second_stage(host)
            if fitted["memory"] != host["memory"]:
                configurations[_CASCADE].update({key: fitted[key] for key in _FITTED if key in fitted})
        print(report(self, plans, self._asked))
        recursive_fix_for_json_export(plans)
        folder = Path(nnUNet_preprocessed, self.dataset_name)
        for line in overwritten(folder / f"{self.plans_identifier}.json", plans):
            print(line)
        for line in settled(folder, plans, self.dataset_fingerprint, list(self.dataset)):
            print(line)
        super().save_plans(plans)

    def with_patch(self, plan: dict[str, Any], patch: Sequence[int]) -> dict[str, Any] | None:
        """The plan with a patch, padded to what its strides divide, and the topology that nnU-Net gives it.

        Args:
            plan: A configuration; it is not changed.
            patch: Voxels per axis.

        Returns:
            None where there is no such network.
        """
        _, strides, kernels, padded, _ = get_pool_and_conv_props(
            plan["spacing"], patch, self.UNet_featuremap_min_edge_length, 999999
        )
        stages, dim = len(strides), len(padded)
        if stages < _FEWEST_STAGES:
            return None
        most = self.UNet_max_features_2d if dim == 2 else self.UNet_max_features_3d
        arguments = plan["architecture"]["arch_kwargs"]
        depth = "n_blocks_per_stage" if "n_blocks_per_stage" in arguments else "n_conv_per_stage"
        topology = {
            "n_stages": stages,
            "features_per_stage": tuple(min(most, self.UNet_base_num_features * 2**i) for i in range(stages)),
            "kernel_sizes": kernels,
            "strides": strides,
            depth: self.UNet_blocks_per_stage_encoder[:stages],
            "n_conv_per_stage_decoder": self.UNet_blocks_per_stage_decoder[: stages - 1],
        }
        architecture = {**plan["architecture"], "arch_kwargs": {**arguments, **topology}}
        return {**plan, "patch_size": [int(n) for n in padded], "architecture": architecture}

    def decisive_patch(self, plan: dict[str, Any]) -> Sequence[int]:
        """The patch that is to be as large as possible."""
        patch: Sequence[int] = plan["patch_size"]
        return patch

    def memory_voxels(self, plan: dict[str, Any]) -> float:
        """What the memory of plans near each other is about proportional to; it only steers the search."""
        return prod(plan["patch_size"])

    def step_memory(self, plan: dict[str, Any]) -> TrainingMemory:
        """Memory of the training that a configuration is planned for; of several trainings the largest."""
        found = (training_memory(setting, self.trainer) for setting in self.settings_of(plan))
        return max(found, key=lambda memory: memory.expected)

    def second_stage(self, host: dict[str, Any]) -> dict[str, Any]:
        """The second stage of nnU-Net's cascade: its host's patch and batch, or its own where these don't fit.

        Args:
            host: Configuration as planned, without the channels that a first stage adds.
        """
        plan = {**host, "previous_stage": LOWRES}
        if self.step_memory(plan).expected <= self._target:
            return plan
        return self._fitted(plan, self._asked[host["data_identifier"]])

    def measured(self, plan: dict[str, Any], asked: Asked) -> TrainingMemory:
        """Memory of a configuration; what was counted of it before is known, and searches that follow begin with it.

        Args:
            plan: A configuration of this planner's network.
            asked: What the plan was asked for.
        """
        batch, known = plan["batch_size"], self._known_of(plan)
        candidate = self._candidate(plan, 1.0, asked, batch)
        if (candidate.key, batch) not in known:
            known[candidate.key, batch] = Choice(candidate, batch, self._measured(candidate, batch))
        return known[candidate.key, batch].memory

    def settings_of(self, plan: dict[str, Any]) -> list[Setting]:
        """The trainings that a configuration is planned for."""
        return [self.setting_of(plan)]

    def setting_of(self, plan: dict[str, Any]) -> Setting:
        """What a training of a configuration reads."""
        used = ("patch_size", "batch_size", "spacing", "normalization_schemes", "architecture", "me_unet")
        configuration = {key: plan[key] for key in (*used, "previous_stage") if key in plan}
        configuration["spacing"] = [float(s) for s in plan["spacing"]]
        configuration["batch_dice"] = False
        plans = {
            "dataset_name": "planned",
            "plans_name": self.plans_identifier,
            "label_manager": "LabelManager",
            "configurations": {"planned": configuration},
        }
        return Setting(
            plans=plans, dataset=self.dataset_json, configuration="planned", trusted=True
        )  # the planner's own network

    def _fitted(self, plan: dict[str, Any], asked: Asked, draft: bool = False) -> dict[str, Any]:
        """The plan with the patch and the batch that fit; a draft may be a prediction that nnU-Net will discard."""
        candidates = self._candidates(plan, asked)
        if not candidates:
            raise ValueError(
                f"{type(self).__name__} needs images that a network of {_FEWEST_STAGES} stages can halve twice, got a "
                f"typical size of {[round(float(n), 1) for n in asked[1]]} voxels: use a finer target spacing."
            )
        search = MemorySearch(
            target=self._target,
            least=self.UNet_min_batch_size,
            guess=_VOXELS_PER_GB[len(plan["patch_size"])] * self.UNet_vram_target_GB,
            measure=self._measured,
            known=self._known_of(plan),
        )
        if draft and search.known:
            ordered = sorted(candidates, key=lambda c: c.worth, reverse=True)
            found = search.predicted(ordered)
            # nnU-Net goes on to a larger spacing until the patch covers so much of the image.
            if found and prod(found[0].plan["patch_size"]) < 0.9 * self.lowres_creation_threshold * prod(asked[1]):
                return {**found[0].plan, "batch_size": found[1]}
        choice = search.run(candidates)
        if choice is None:
            smallest = min(candidates, key=lambda c: c.worth)
            least = self._measured(smallest, self.UNet_min_batch_size).expected
            raise ValueError(
                f"{type(self).__name__} finds no patch that trains in {self.UNet_vram_target_GB:g} GB: the smallest, "
                f"{'x'.join(map(str, smallest.plan['patch_size']))} with batch {self.UNet_min_batch_size}, needs "
                f"{least / GIB:.2f} GB; enlarge -gpu_memory_target."
            )
        return {
            **choice.candidate.plan,
            "batch_size": choice.batch,
            "memory": memory_entry(choice, self._target, self.trainer),
        }

    def _candidates(self, plan: dict[str, Any], asked: Asked) -> list[Candidate]:
        spacing, median_shape, _ = asked
        found: dict[str, Candidate] = {}
        batch = self._host_batch(asked)
        shapes = patch_shapes([float(s) for s in spacing], image_size(list(median_shape)[: len(spacing)]))
        for shape, distortion in shapes.items():
            planned = self.with_patch(plan, shape)
            if planned is None:
                continue
            candidate = self._candidate(planned, distortion, asked, batch)
            if candidate.key not in found or candidate.worth > found[candidate.key].worth:
                found[candidate.key] = candidate
        return list(found.values())

    def _host_batch(self, asked: Asked) -> int:
        """Patches that nnU-Net's own planner takes for the same data and target."""
        batch: int = planned_by(host_of(self), asked, self._sizes)["batch_size"]
        return batch

    def _candidate(self, plan: dict[str, Any], distortion: float, asked: Asked, batch: int) -> Candidate:
        spacing, median_shape, n_voxels = asked
        patch, arguments = plan["patch_size"], plan["architecture"]["arch_kwargs"]
        decisive, image = self.decisive_patch(plan), image_size(list(median_shape)[: len(spacing)])
        allowed = round(n_voxels * self.max_dataset_covered / prod(patch))
        return Candidate(
            plan=plan,
            key=json.dumps([patch, arguments["strides"], arguments["kernel_sizes"], plan.get("me_unet")]),
            worth=prod(decisive) / sqrt(distortion),
            voxels=self.memory_voxels(plan),
            weights=_weights(arguments),
            covers_image=all(n >= size for n, size in zip(decisive, image, strict=True)),
            most=max(self.UNet_min_batch_size, min(allowed, batch)),
            bound=BATCH if batch < allowed else "data set",
        )

    def _known_of(self, plan: dict[str, Any]) -> dict[tuple[str, int], Choice]:
        """What was counted of networks like that of a plan."""
        return self._known.setdefault((len(plan["patch_size"]), "previous_stage" in plan), {})

    @property
    def _target(self) -> int:
        """Bytes."""
        return round(self.UNet_vram_target_GB * GIB)

    def _measured(self, candidate: Candidate, batch: int) -> TrainingMemory:
        return self.step_memory({**candidate.plan, "batch_size": batch})


def _weights(arguments: Mapping[str, Any]) -> float:
    """Number of weights of a U-Net of these stages, up to a factor."""
    features = arguments["features_per_stage"]
    kernels = arguments["kernel_sizes"]
    return sum(
        prod(kernel) * n * (n + below) for n, below, kernel in zip(features, (1, *features[:-1]), kernels, strict=True)
    )
