"""Trainer of the Implicit U-Net with a narrow decoder."""

from __future__ import annotations

from nnunet_ext.trainers.nnUNetTrainerImplicit import nnUNetTrainerImplicit


class nnUNetTrainerImplicitLite(nnUNetTrainerImplicit):
    """Implicit U-Net with a decoder of width 256: a third of the operations per decoded voxel."""

    decoder_width = 256
