"""Trainer of both stages of meU-net's cascade."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ext.trainers.checkpointing import AtomicCheckpointMixin
from nnunet_ext.trainers.me_cascade import MeCascadeTrainerMixin


class nnUNetTrainerMeCascade(MeCascadeTrainerMixin, AtomicCheckpointMixin, nnUNetTrainer):
    """meU-net's cascade (Wang et al. 2022): `DualMeUNet` in stage 1, `PostConcatUNet` in stage 2.

    nnU-Net looks for stage 1 under the name of the same trainer, so that one trains both; the plans of
    `MeCascadePlanner` tell the stages apart. All folds of stage 1 are trained and validated before stage 2.
    """
