"""How near activations come to the end of float16, told in the log before losses become NaN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nnunet_ext.trainers.autocast import nnunet_autocast
from nnunet_ext.trainers.several_gpus import is_first
from nnunet_ext.trainers.unwrapped import unwrapped

if TYPE_CHECKING:
    from nnunet_ext.protocols import HostTrainer
else:
    HostTrainer = object

FLOAT16_ENDS = torch.finfo(torch.float16).max  # 65504
_NEAR = 1 / 16  # of it


class ValueRangeMixin(HostTrainer):
    """Looks at one validation patch per epoch, and says where float16 values grow large; for mixed precision alone.

    One sample without gradients, uncompiled, beside nnU-Net's 250 training steps. Stands before ``nnUNetTrainer`` in
    the bases of a trainer.
    """

    _is_to_look = False
    _largest_told = 0.0

    def on_validation_epoch_start(self) -> None:
        """Start as nnU-Net does."""
        super().on_validation_epoch_start()
        self._is_to_look = is_first(self)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Validate as nnU-Net does; the first batch of an epoch is looked at before."""
        if self._is_to_look:
            self._is_to_look = False
            self._look(batch["data"][:1])
        return super().validation_step(batch)

    def _look(self, image: Tensor) -> None:
        with torch.no_grad(), nnunet_autocast(self.device):
            if not torch.is_autocast_enabled(self.device.type):
                return
            try:
                found = largest_activations(unwrapped(self.network), image.to(self.device))
            except torch.OutOfMemoryError:  # validation itself may be compiled, and need less
                return
        name, value = max(found.items(), key=lambda entry: entry[1], default=("", 0.0))
        if value > max(_NEAR * FLOAT16_ENDS, 2 * self._largest_told):
            self._largest_told = value
            self.print_to_log_file(
                f"Largest activation in float16: {value:g}, in {name}. At {FLOAT16_ENDS:g} losses "
                "become infinite and their steps are left out; a lower learning rate or a larger weight decay keeps "
                "activations small."
            )


def largest_activations(network: nn.Module, image: Tensor, dtype: torch.dtype = torch.float16) -> dict[str, float]:
    """Largest absolute value of what each part of a network gives in a dtype, where it gives any.

    Args:
        network: Without the wrappers of DDP and `torch.compile`.
        image: (B, C, *patch); the caller sets autocast, and whether gradients are kept.
        dtype: What counts.

    Returns:
        Name of the part, of one that is not in the network its class -> value; infinity where it gave that, or NaN.
    """
    found: dict[str, Tensor] = {}
    names = {id(part): name for name, part in network.named_modules()}

    def note(part: nn.Module, _: Any, output: Any) -> None:
        is_leaf = next(part.children(), None) is None
        if is_leaf and isinstance(output, Tensor) and output.dtype == dtype and output.numel():
            low, high = torch.aminmax(output.detach())  # without a copy, and NaN where there is one
            value = torch.maximum(-low, high).float().nan_to_num(nan=float("inf"), posinf=float("inf"))
            name = names.get(id(part), type(part).__name__)
            found[name] = torch.maximum(found[name], value) if name in found else value

    # Not on its parts: a network that fuses itself would not where hooks look into it.
    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        network(image)
    finally:
        hook.remove()
    values = torch.stack([*found.values()]).tolist() if found else []
    return dict(zip(found, values, strict=True))
