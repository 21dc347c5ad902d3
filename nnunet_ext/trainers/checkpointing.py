"""Checkpoints that a kill or a full disk can't leave half written."""

from __future__ import annotations

import os
from typing import Any


class AtomicCheckpointMixin:
    """Writes a checkpoint beside its place and renames it, so that the file a run continues from is always whole.

    Stands before ``nnUNetTrainer`` in the bases of a trainer.
    """

    def save_checkpoint(self: Any, filename: str) -> None:
        """Save as nnU-Net does, atomically; on failure the previous checkpoint stays and the error is raised."""
        partial = f"{filename}.partial"
        try:
            super().save_checkpoint(partial)  # type: ignore[misc]
            if os.path.isfile(partial):  # only rank 0 writes, and only where checkpointing is enabled
                os.replace(partial, filename)
        finally:
            if os.path.isfile(partial):
                os.remove(partial)
