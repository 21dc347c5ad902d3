"""What all trainers are made of; with nnU-Net's own network it is what schedules by suffix of ``nnUNetTrainer`` run."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ext.trainers.checkpointing import AtomicCheckpointMixin
from nnunet_ext.trainers.ending import EndsTogetherMixin
from nnunet_ext.trainers.finite_steps import FiniteStepsMixin
from nnunet_ext.trainers.several_gpus import SeveralGPUsMixin
from nnunet_ext.trainers.value_range import ValueRangeMixin


class CoreTrainer(
    AtomicCheckpointMixin, EndsTogetherMixin, SeveralGPUsMixin, FiniteStepsMixin, ValueRangeMixin, nnUNetTrainer
):
    """Default nnU-Net, whose checkpoints are whole, whose processes end together and whose steps are finite."""
