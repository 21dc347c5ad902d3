"""Trainer of nnU-Net's own network with half of its features, the anchor of every comparison of small networks."""

from __future__ import annotations

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_ext.trainers.core import CoreTrainer
from nnunet_ext.trainers.from_plans import builds


def half_features(configuration_manager: ConfigurationManager) -> list[int]:
    """Half of the plans' `features_per_stage`, rounded down.

    Raises:
        ValueError: the plans hold no features_per_stage, or fewer than two in a stage.
    """
    features = configuration_manager.network_arch_init_kwargs.get("features_per_stage")
    if features is None or min(features) < 2:
        raise ValueError(
            f"Half width needs plans with features_per_stage of at least 2, got {features} for "
            f"{configuration_manager.network_arch_class_name}: use plans of nnU-Net's default or ResEnc planners (-p)."
        )
    return [n // 2 for n in features]


class nnUNetTrainerHalfWidth(CoreTrainer):
    """nnU-Net's network of the plans with half of the features: a quarter of parameters and operations.

    What a method saves beyond this is its own merit.
    """

    build_network_architecture = builds(None, features_per_stage=half_features)
