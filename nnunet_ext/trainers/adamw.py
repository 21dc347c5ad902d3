"""AdamW in place of nnU-Net's SGD, for networks that stop improving early with that.

Loshchilov, Hutter 2019, https://arxiv.org/abs/1711.05101.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunet_ext.errors import UsageError

if TYPE_CHECKING:
    from nnunet_ext.protocols import HostTrainer
else:
    HostTrainer = object


class AdamWMixin(HostTrainer):
    """Trains with AdamW and nnU-Net's polynomial decay; place it before nnUNetTrainer.

    What it is good for: docs/methods/reversible.md. nnU-Net's `initial_lr` and `weight_decay` follow its attributes.

    Attributes:
        learning_rate: At the start of the decay.
        adamw_weight_decay: Decoupled, per unit of learning rate (PyTorch's default).
    """

    learning_rate: float = 1e-3
    adamw_weight_decay: float = 1e-2
    _has_other_memory = False  # a checkpoint was loaded that another optimiser has left

    def initialize(self) -> None:
        """Initialise as nnU-Net does, with this learning rate."""
        self.initial_lr = self.learning_rate
        self.weight_decay = self.adamw_weight_decay
        super().initialize()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """AdamW with nnU-Net's schedule."""
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        optimizer.register_load_state_dict_pre_hook(self._own_memory)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def on_train_start(self) -> None:
        """Start as nnU-Net does.

        Raises:
            UsageError: the checkpoint that is continued holds the memory of another optimiser.
        """
        if self._has_other_memory and self.current_epoch < self.num_epochs:
            raise UsageError(
                f"{type(self).__name__} trains with AdamW, the checkpoint of epoch {self.current_epoch} that it "
                "continues holds the memory of another optimiser: end it with the version of this package that began "
                f"it, or move the checkpoints in {self.output_folder} away to train anew. Its weights can be given to "
                "-pretrained_weights; validation and prediction take it as it is."
            )
        super().on_train_start()

    def _own_memory(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        """What AdamW loads: nothing of another optimiser's, with which it would fail, also where nothing is trained."""
        (own, *_), (theirs, *_) = optimizer.param_groups, state["param_groups"]
        self._has_other_memory = "betas" not in theirs or theirs.get("amsgrad", False) != own["amsgrad"]
        return optimizer.state_dict() if self._has_other_memory else None
