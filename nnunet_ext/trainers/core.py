"""nnU-Net's own trainer with our checkpoints: what schedules by suffix of ``nnUNetTrainer`` are made of."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ext.trainers.checkpointing import AtomicCheckpointMixin
from nnunet_ext.trainers.several_gpus import SeveralGPUsMixin


class CoreTrainer(AtomicCheckpointMixin, SeveralGPUsMixin, nnUNetTrainer):
    """Default nnU-Net."""
