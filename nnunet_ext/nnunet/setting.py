"""The setting that networks are compared in: plans, configuration, channels and classes, and networks built for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.plans import configuration
from nnunet_ext.nnunet.taught import TaughtNetwork
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.nnunet.trust import check_host_names, check_network
from nnunet_ext.protocols import HasTeacher, HasTrainingForm


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One configuration of nnU-Net's plans for one data set.

    Args:
        plans: Content of plans.json.
        dataset: Content of dataset.json.
        configuration: A name in `plans`.
        trusted: Build whatever code the plans name, see `nnunet_ext.nnunet.trust`.

    Raises:
        UsageError: the plans don't have the configuration, or not as nnU-Net writes it.
    """

    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]
    configuration: str
    trusted: bool = False

    def __post_init__(self) -> None:
        configuration(self.plans, self.configuration)

    def check_code(self) -> None:
        """See that the plans name no code but networks, layers and what nnU-Net has.

        Raises:
            UsageError: they do, and are not trusted.
        """
        if not self.trusted:
            configuration = self.configuration_manager.configuration
            check_network(configuration)
            check_host_names(self.plans, self.dataset, configuration)

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
        """Voxels of the patch per voxel of the coarsest stage, per axis.

        Raises:
            UsageError: the plans hold none.
        """
        strides = self.configuration_manager.network_arch_init_kwargs.get("strides")
        try:
            found = tuple(math.prod(map(int, axis)) for axis in zip(*strides, strict=True))
        except (TypeError, ValueError):
            found = ()
        if len(found) != len(self.patch_size) or min(found) < 1:
            raise UsageError(
                f"{self.configuration} needs strides for {len(self.patch_size)} axes in its arch_kwargs, got "
                f"{strides!r:.80}: plan the data set again."
            )
        return found

    @property
    def input_channels(self) -> int:
        """Channels of the image, and those of the previous stage in a cascade.

        Raises:
            UsageError: dataset.json lacks them, or its labels break nnU-Net's rules.
        """
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

        _ = self.label_manager  # says which rule of the labels is broken
        try:
            return int(determine_num_input_channels(self.plans_manager, self.configuration_manager, dict(self.dataset)))
        except Exception as error:  # whatever nnU-Net meets in a dataset.json that it did not write
            raise UsageError(
                f"dataset.json must hold channel_names, nnU-Net fails with {error!r}: give the one of the plans."
            ) from error

    @property
    def label_manager(self) -> Any:
        """nnU-Net's view of the labels.

        Raises:
            UsageError: they break its rules.
        """
        try:
            return self.plans_manager.get_label_manager(dict(self.dataset))
        except Exception as error:  # of nnU-Net's own checks
            raise UsageError(
                f"the labels of dataset.json must keep nnU-Net's rules, it says: {error}: correct them, or give the "
                "dataset.json of the plans."
            ) from error

    @property
    def num_classes(self) -> int:
        """Channels of the network's output."""
        return int(self.label_manager.num_segmentation_heads)

    def builder(self, trainer: str, deep_supervision: bool = True) -> Callable[[], nn.Module]:
        """Return a function that builds the trainer's network as `nnUNetv2_train` does.

        Raises:
            UsageError: no trainer has this name, or the plans name code that is not trusted.
        """
        self.check_code()
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

        Raises:
            UsageError: no trainer has this name.
        """
        build, form = self.builder(trainer), self.training_form(trainer)
        return lambda: form(build())

    def training_form(self, trainer: str) -> Callable[[nn.Module], nn.Module]:
        """Return a function that makes of a network what a training step of the trainer runs.

        That is the network itself, the network with its teacher, or what the trainer's
        `training_form(network, configuration_manager)` makes of it.

        Raises:
            UsageError: no trainer has this name.
        """
        found = trainer_class(trainer)
        if isinstance(found, HasTrainingForm):
            return lambda network: found.training_form(network, self.configuration_manager)
        if isinstance(found, HasTeacher):
            teacher = found.teacher_builder(self)
            return lambda network: TaughtNetwork(network, teacher(), found.at_outputs)
        return lambda network: network
