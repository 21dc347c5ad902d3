"""Trainer of nnU-Net's own networks with activation checkpointing."""

from __future__ import annotations

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_ext.architectures.checkpointed.levels import Recompute
from nnunet_ext.architectures.checkpointed.unet import CheckpointedPlainConvUNet, CheckpointedResidualEncoderUNet
from nnunet_ext.trainers.compiled_ddp import CompiledCheckpointsMixin
from nnunet_ext.trainers.core import CoreTrainer
from nnunet_ext.trainers.from_plans import network_of, planned_arguments

_NETWORKS = {"PlainConvUNet": CheckpointedPlainConvUNet, "ResidualEncoderUNet": CheckpointedResidualEncoderUNet}


class nnUNetTrainerActivationCheckpointing(CompiledCheckpointsMixin, CoreTrainer):
    """nnU-Net's network of the plans, default or ResEnc, whose stages the backward pass computes once more.

    Parameters, checkpoints and results are those of nnU-Net's default trainer; memory is less, time more.

    Attributes:
        recompute: "stages": all but what leads from one resolution to others. "norms": all but convolutions, which
            keeps more and takes less time. "finest": the finest levels as "stages", others as "norms".
        samples_apart: Run large feature maps in groups of samples; None: where the norm treats samples apart.
    """

    recompute: Recompute = "stages"
    samples_apart: bool | None = None

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the network of the plans, for training and prediction.

        Raises:
            ValueError: the plans are for another network; see `nnunet_ext.trainers.from_plans.network_of`.
        """
        planned = planned_arguments(configuration_manager)
        name = configuration_manager.network_arch_class_name
        network = _NETWORKS.get(name.rpartition(".")[2])
        if network is None:
            raise ValueError(
                f"Activation checkpointing recomputes the stages of {' and '.join(_NETWORKS)}, but these plans are for "
                f"{name:.80}: use plans of nnU-Net's default or ResEnc planners (-p), or the trainer of that network "
                "(-tr)."
            )
        return network_of(
            f"{network.__module__}.{network.__name__}",
            {**planned, "recompute": cls.recompute, "samples_apart": cls.samples_apart},
            configuration_manager.network_arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
