"""Mixed precision as nnU-Net trains with it."""

from __future__ import annotations

import torch


def nnunet_autocast(device: torch.device) -> torch.autocast:
    """Autocast as nnU-Net trains: in float16 on CUDA, else off."""
    return torch.autocast(device.type, enabled=device.type == "cuda")
