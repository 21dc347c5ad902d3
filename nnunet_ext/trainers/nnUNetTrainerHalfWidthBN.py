"""Trainer of nnU-Net's own network with half of its features and batch norm."""

from __future__ import annotations

from pydoc import locate

from dynamic_network_architectures.building_blocks.helper import get_matching_batchnorm
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_ext.trainers.nnUNetTrainerHalfWidth import build_half_width, nnUNetTrainerHalfWidth


class nnUNetTrainerHalfWidthBN(nnUNetTrainerHalfWidth):
    """`nnUNetTrainerHalfWidth` with batch norm, which `nnunet-ext deploy` folds: the fair rival of FasterFusionBN."""

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the network of the plans at half width with batch norm, for training and prediction."""
        norm = get_matching_batchnorm(locate(configuration_manager.network_arch_init_kwargs["conv_op"]))
        kwargs = configuration_manager.network_arch_init_kwargs.get("norm_op_kwargs") or {}
        return build_half_width(
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
            norm_op=f"{norm.__module__}.{norm.__name__}",
            norm_op_kwargs={k: v for k, v in kwargs.items() if k in ("eps", "momentum", "affine")},
        )
