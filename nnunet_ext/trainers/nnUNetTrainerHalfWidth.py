"""Trainer of nnU-Net's own network with half of its features, the anchor of every comparison of small networks."""

from __future__ import annotations

from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_ext.trainers.checkpointing import AtomicCheckpointMixin


class nnUNetTrainerHalfWidth(AtomicCheckpointMixin, nnUNetTrainer):
    """nnU-Net's network of the plans with half of the features: a quarter of parameters and operations.

    What a method saves beyond this is its own merit.
    """

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the network of the plans at half width, for training and prediction."""
        return build_half_width(
            configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )


def build_half_width(
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool,
    **options: Any,
) -> nn.Module:
    """Build the network of the plans with half of `features_per_stage`, rounded down, and `options`.

    Raises:
        ValueError: the plans hold no features_per_stage, or fewer than two in a stage.
    """
    arguments = dict(configuration_manager.network_arch_init_kwargs)
    features = arguments.get("features_per_stage")
    if features is None or min(features) < 2:
        raise ValueError(
            f"Half width needs plans with features_per_stage of at least 2, got {features} for "
            f"{configuration_manager.network_arch_class_name}: use plans of nnU-Net's default or ResEnc planners (-p)."
        )
    arguments["features_per_stage"] = [n // 2 for n in features]
    return get_network_from_plans(
        configuration_manager.network_arch_class_name,
        {**arguments, **options},
        configuration_manager.network_arch_init_kwargs_req_import,
        num_input_channels,
        num_output_channels,
        allow_init=True,
        deep_supervision=enable_deep_supervision,
    )
