"""The setting that networks are compared in: plans, configuration, channels and classes, and networks built for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nnunet_ext.errors import UsageError
from nnunet_ext.lookup import trainer_class


@dataclass(frozen=True)
class Setting:
    """One configuration of nnU-Net's plans for one data set.

    Args:
        plans: content of plans.json.
        dataset: content of dataset.json.
        configuration: a name in `plans`.

    Raises:
        UsageError: the plans don't have the configuration.
    """

    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]
    configuration: str

    def __post_init__(self) -> None:
        known = self.plans.get("configurations", {})
        if self.configuration not in known:
            raise UsageError(
                f"the plans {self.plans.get('plans_name', '')} have the configurations {', '.join(known) or 'none'}, "
                f"got {self.configuration}: choose one of them."
            )

    @property
    def plans_manager(self) -> Any:
        """nnU-Net's view of the plans."""
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        return PlansManager(dict(self.plans))

    @property
    def configuration_manager(self) -> Any:
        """nnU-Net's view of the configuration."""
        return self.plans_manager.get_configuration(self.configuration)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Voxels per axis."""
        return tuple(int(n) for n in self.configuration_manager.patch_size)

    @property
    def batch_size(self) -> int:
        """Patches per training step."""
        return int(self.configuration_manager.batch_size)

    @property
    def strides(self) -> tuple[int, ...]:
        """Voxels of the patch per voxel of the coarsest stage, per axis."""
        return tuple(
            math.prod(axis) for axis in zip(*self.configuration_manager.pool_op_kernel_sizes, strict=True)
        )

    @property
    def input_channels(self) -> int:
        """Channels of the image, and those of the previous stage in a cascade."""
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

        return int(
            determine_num_input_channels(self.plans_manager, self.configuration_manager, dict(self.dataset))
        )

    @property
    def num_classes(self) -> int:
        """Channels of the network's output."""
        return int(self.plans_manager.get_label_manager(dict(self.dataset)).num_segmentation_heads)

    def builder(self, trainer: str, deep_supervision: bool = True) -> Callable[[], nn.Module]:
        """Return a function that builds the trainer's network as `nnUNetv2_train` does.

        Raises:
            UsageError: no trainer has this name.
        """
        network_of = trainer_class(trainer).build_network_architecture
        arguments = (
            self.plans_manager,
            self.configuration_manager,
            self.input_channels,
            self.num_classes,
            deep_supervision,
        )

        def build() -> nn.Module:
            network: nn.Module = network_of(*arguments)
            return network

        return build

    def training_builder(self, trainer: str) -> Callable[[], nn.Module]:
        """Return a function that builds what a training step of the trainer runs, as a module.

        That is the network, or what the trainer's `training_form(network, configuration_manager)` makes of it.

        Raises:
            UsageError: no trainer has this name.
        """
        build = self.builder(trainer)
        form = getattr(trainer_class(trainer), "training_form", None)
        return build if form is None else lambda: form(build(), self.configuration_manager)
