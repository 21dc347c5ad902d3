"""What the planners of memory-saving networks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from torch import nn


class FreedMemoryPlanner(ExperimentPlanner):
    """Plans a larger patch, up to the whole image, then a larger batch, in the same GPU memory target.

    nnU-Net's own planning with the memory of `network_class` in place of the default network's. Preprocessed data of
    `nnUNetPlans` is reused.

    Attributes:
        network_class: network that is planned.
        network_options: options of the network, written into the plans.
        default_plans_name: name of the plans where none is asked for.
    """

    network_class: type[nn.Module]
    network_options: Mapping[str, Any] = {}
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

    def static_estimate_VRAM_usage(  # noqa: N802
        self,
        patch_size: Any,
        input_channels: int,
        output_channels: int,
        name: str,
        arguments: Any,
        imported: Any,
    ) -> Any:
        """Ask the network that is trained, with its options, for its memory."""
        options = {**arguments, **self.network_options}
        return ExperimentPlanner.static_estimate_VRAM_usage(
            patch_size, input_channels, output_channels, name, options, imported
        )

    def get_plans_for_configuration(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Plan as nnU-Net does and note the options of the network."""
        plan: dict[str, Any] = super().get_plans_for_configuration(*args, **kwargs)
        plan["architecture"]["arch_kwargs"].update(self.network_options)
        return plan
