"""The name under which `nnunet-ext deploy` stores models; it predicts only."""

from __future__ import annotations

from typing import Any, NoReturn

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_ext.architectures.deployed import DTYPES, DeployedNetwork, fused
from nnunet_ext.nnunet.trainers import trainer_class


class nnUNetTrainerDeployed(nnUNetTrainer):
    """Predicts with models that `nnunet-ext deploy` made; can't train.

    The plans of such a model say which trainer's network was fused, and in which precision it runs.
    """

    predicts_only = True

    def initialize(self) -> NoReturn:
        """Refuse to train."""
        raise NotImplementedError(
            "nnUNetTrainerDeployed only predicts, because fused weights can't be trained: train with the trainer that "
            'the model came from ("deployed" in its plans.json), then call `nnunet-ext deploy` again.'
        )

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """Build the network of the trainer that the plans name, fused."""
        deployed: dict[str, Any] | None = configuration_manager.configuration.get("deployed")
        if deployed is None:
            raise ValueError(
                'nnUNetTrainerDeployed needs plans that hold "deployed", these are of a training: make the model by '
                "`nnunet-ext deploy`, and predict with `nnUNetv2_predict_from_modelfolder`."
            )
        network = trainer_class(deployed["trainer"]).build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=False
        )
        return DeployedNetwork(fused(network, deployed["form"]), DTYPES[deployed["dtype"]]).eval()
