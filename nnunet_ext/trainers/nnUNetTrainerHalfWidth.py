"""Trainer of nnU-Net's own network with half of its features, the anchor of every comparison of small networks."""

from __future__ import annotations

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_ext.architectures.common.plan_arguments import PerStage
from nnunet_ext.architectures.common.plan_values import check_values
from nnunet_ext.trainers.core import CoreTrainer
from nnunet_ext.trainers.from_plans import builds, planned_arguments


def half_features(configuration_manager: ConfigurationManager) -> list[int] | int:
    """Half of the plans' `features_per_stage`, rounded down.

    Raises:
        ValueError: the plans hold no features_per_stage, those are no numbers, or fewer than two in a stage.
    """
    features = planned_arguments(configuration_manager).get("features_per_stage")
    check_values({"features_per_stage": PerStage | None}, {"features_per_stage": features})
    each: list[int] = [] if features is None else [features] if isinstance(features, int) else list(features)
    if min(each, default=0) < 2:
        raise ValueError(
            f"Half width needs plans with features_per_stage of at least 2, got {features} for "
            f"{configuration_manager.network_arch_class_name}: use plans of nnU-Net's default or ResEnc planners (-p)."
        )
    halves = [n // 2 for n in each]
    return halves[0] if isinstance(features, int) else halves


class nnUNetTrainerHalfWidth(CoreTrainer):
    """nnU-Net's network of the plans with half of the features: a quarter of parameters and operations.

    What a method saves beyond this is its own merit.
    """

    build_network_architecture = builds(None, features_per_stage=half_features)
