"""Trainer of meU-net on nnU-Net's own networks."""

from __future__ import annotations

from nnunet_ext.trainers.core import CoreTrainer
from nnunet_ext.trainers.from_plans import builds
from nnunet_ext.trainers.me_unet import MeUNetTrainerMixin


class nnUNetTrainerMeUNet(MeUNetTrainerMixin, CoreTrainer):
    """meU-net (Wang et al. 2022): trains the network of the plans with a large patch at the memory of a small one.

    The patch of the plans is the large one. Network and checkpoints are those of nnU-Net's default trainer. What only
    the large patch shows full resolution does not learn: for that take `nnUNetTrainerMeUNetOnePass`.
    """

    build_network_architecture = builds(None)
