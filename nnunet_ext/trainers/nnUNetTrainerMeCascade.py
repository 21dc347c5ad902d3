"""Trainer of both stages of meU-net's cascade."""

from __future__ import annotations

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_ext.architectures.checkpointed.levels import Recompute
from nnunet_ext.architectures.me_unet import DualMeUNet
from nnunet_ext.architectures.post_concat_unet import PostConcatUNet
from nnunet_ext.trainers.core import CoreTrainer
from nnunet_ext.trainers.from_plans import build_from_plans, planned_arguments
from nnunet_ext.trainers.me_cascade import MeCascadeTrainerMixin
from nnunet_ext.trainers.vae import image_channels


class nnUNetTrainerMeCascade(MeCascadeTrainerMixin, CoreTrainer):
    """meU-net's cascade (Wang et al. 2022): `DualMeUNet` in stage 1, `PostConcatUNet` in stage 2.

    nnU-Net looks for stage 1 under the name of the same trainer, so that one trains both; the plans of
    `MeCascadePlanner` tell the stages apart. All folds of stage 1 are trained and validated before stage 2.

    Attributes:
        recompute: "stages", "norms" or "finest": train both networks with activation checkpointing; None: without.
    """

    recompute: Recompute | None = None

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the network of the configuration's stage, for training and prediction."""
        arguments = (configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision)
        if configuration_manager.previous_stage_name is None:
            return build_from_plans(DualMeUNet, *arguments, recompute=cls.recompute)
        prior = num_input_channels - image_channels(configuration_manager)
        planned = planned_arguments(configuration_manager).get("prior_channels", prior)
        if planned != prior:
            raise ValueError(
                f"The plans' prior_channels are one for each foreground label, got {planned}, but dataset.json has "
                f"{prior} of them: plan again (-pl MeCascadePlanner) and train both stages again."
            )
        return build_from_plans(PostConcatUNet, *arguments, prior_channels=prior, recompute=cls.recompute)
