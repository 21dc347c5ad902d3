"""What the planners of memory-saving networks share."""

from __future__ import annotations

from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from torch import nn


class FreedMemoryPlanner(ExperimentPlanner):
    """Plans a larger patch, up to the whole image, then a larger batch, in the same GPU memory target.

    nnU-Net's own planning with the memory of `network_class` in place of the default network's. Preprocessed data of
    `nnUNetPlans` is reused.

    Attributes:
        network_class: network that is planned.
        blocks_per_stage: depth preset written into the plans: one number for all stages, one per resolution, or
            None for as many blocks as nnU-Net plans convolutions. Nearly free in memory, linear in time.
        default_plans_name: name of the plans where none is asked for.
    """

    network_class: type[nn.Module]
    blocks_per_stage: int | list[int] | None = None
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
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name or self.default_plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )
        self.UNet_class = self.network_class

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Reuse the data of nnU-Net's default plans where spacing and normalisation are the same."""
        same_data = self.overwrite_target_spacing is None and self.preprocessor_name == "DefaultPreprocessor"
        if configuration_name in ("2d", "3d_fullres") and same_data:
            return f"nnUNetPlans_{configuration_name}"
        return super().generate_data_identifier(configuration_name)

    def get_plans_for_configuration(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Plan as nnU-Net does and note the depth preset for the network."""
        plan: dict[str, Any] = super().get_plans_for_configuration(*args, **kwargs)
        if self.blocks_per_stage is not None:
            plan["architecture"]["arch_kwargs"]["blocks_per_stage"] = self.blocks_per_stage
        return plan
