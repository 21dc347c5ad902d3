"""Mixed precision as nnU-Net trains with it."""

from __future__ import annotations

import torch


def nnunet_autocast(device: torch.device) -> torch.autocast:
    """Autocast as nnU-Net trains: in float16 on CUDA, else off."""
    return torch.autocast(device.type, enabled=device.type == "cuda")


def without_cache(device: torch.device) -> torch.autocast:
    """The autocast that is on, or none, with weights cast anew: a cache would hand them on to the pass that follows."""
    kind = device.type
    is_on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, is_on, cache_enabled=False)
