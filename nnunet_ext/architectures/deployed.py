"""Networks as they are shipped: fused, batch norms folded, in single or half precision."""

from __future__ import annotations

from inspect import signature

import torch
from torch import Tensor, nn

from nnunet_ext.architectures.common.copying import convert_in_place, copied
from nnunet_ext.architectures.common.onednn import computes_natively
from nnunet_ext.architectures.fusion.blocks import Form
from nnunet_ext.architectures.fusion.folding import fold_batch_norms, fold_parametrizations, is_foldable
from nnunet_ext.protocols import Fusable

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class NothingToFuseError(ValueError):
    """A network has nothing that prediction could do without."""


def fused(network: nn.Module, form: Form = "hybrid") -> nn.Module:
    """Return the network that predicts, in evaluation; `network` stays as it is.

    What its own `fuse` does is done first (blocks fused, a branch for training dropped), then batch norms and
    parametrised weights are folded.

    Args:
        network: Trained.
        form: Form of fused FasterFusion blocks.

    Raises:
        NothingToFuseError: see there.
    """
    nothing = NothingToFuseError(
        f"{type(network).__name__} has no block to fuse and no batch norm after a convolution: predict with it as it "
        "was trained."
    )
    if isinstance(network, Fusable):
        options = {"form": form} if "form" in signature(network.fuse).parameters else {}
        result = network.fuse(**options)
    elif not is_foldable(network):
        raise nothing
    else:
        result = copied(network)
    folded = fold_batch_norms(result.eval()) + fold_parametrizations(result)
    before, after = (sum(p.numel() for p in n.parameters()) for n in (network, result))
    if not folded and after == before:
        raise nothing
    return result


class DeployedNetwork(nn.Module):
    """Runs a fused network in the precision of its weights, whatever the predictor's autocast.

    On a CPU that has no instructions for a half precision it computes in float32.

    Args:
        network: See `fused`.
        dtype: Type of weights and computation. In float32 the predictor's autocast decides, as for any network.

    Shape: (B, C, *patch) -> (B, num_classes, *patch), in float32 where `dtype` is bfloat16, because nnU-Net sums what
        windows predict in float16.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.network = network.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Predict a patch."""
        if self.dtype == torch.float32:
            return self.network(x)
        dtype = self.dtype
        if x.device.type == "cpu" and not computes_natively(dtype):
            dtype = torch.float32
            convert_in_place(self.network, dtype)  # does nothing from the second patch on
        with torch.autocast(x.device.type, enabled=False):
            logits = self.network(x.to(dtype))
        return logits.float() if dtype == torch.bfloat16 else logits
