"""Trainer of nnU-Net's own network with half of its features and batch norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamic_network_architectures.building_blocks.helper import get_matching_batchnorm
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_ext.architectures.common.plan_values import check_values
from nnunet_ext.trainers.from_plans import builds, convolution_of, planned_arguments
from nnunet_ext.trainers.nnUNetTrainerHalfWidth import half_features, nnUNetTrainerHalfWidth


def _batch_norm(configuration_manager: ConfigurationManager) -> str:
    norm = get_matching_batchnorm(convolution_of(planned_arguments(configuration_manager)))
    return f"{norm.__module__}.{norm.__name__}"


def _its_options(configuration_manager: ConfigurationManager) -> dict[str, Any]:
    planned = planned_arguments(configuration_manager).get("norm_op_kwargs") or {}
    check_values({"norm_op_kwargs": Mapping[str, Any]}, {"norm_op_kwargs": planned})
    return {k: v for k, v in planned.items() if k in ("eps", "momentum", "affine")}


class nnUNetTrainerHalfWidthBN(nnUNetTrainerHalfWidth):
    """`nnUNetTrainerHalfWidth` with batch norm, which `nnunet-ext deploy` folds: the fair rival of FasterFusionBN."""

    build_network_architecture = builds(
        None, features_per_stage=half_features, norm_op=_batch_norm, norm_op_kwargs=_its_options
    )
