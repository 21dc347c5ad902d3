"""nnU-Net's own trainer with our checkpoints: what schedules by suffix of ``nnUNetTrainer`` are made of."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ext.trainers.checkpointing import AtomicCheckpointMixin


class CoreTrainer(AtomicCheckpointMixin, nnUNetTrainer):
    """Default nnU-Net."""
