"""What nnU-Net finds in ``nnUNet_extTrainer`` where the hook doesn't run (see `nnunet_ext.launch`)."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Return the registered trainer `name`."""
    from _nnunet_ext_hook import lookup

    return lookup("trainers", name)
