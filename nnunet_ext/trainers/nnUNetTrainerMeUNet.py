"""Trainer of meU-net on nnU-Net's own networks."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ext.trainers.checkpointing import AtomicCheckpointMixin
from nnunet_ext.trainers.me_unet import MeUNetTrainerMixin
from nnunet_ext.trainers.several_gpus import SeveralGPUsMixin


class nnUNetTrainerMeUNet(MeUNetTrainerMixin, AtomicCheckpointMixin, SeveralGPUsMixin, nnUNetTrainer):
    """meU-net (Wang et al. 2022): trains the network of the plans with a large patch at the memory of a small one.

    The patch of the plans is the large one. Network and checkpoints are those of nnU-Net's default trainer. What only
    the large patch shows full resolution does not learn: for that take `nnUNetTrainerMeUNetOnePass`.
    """
