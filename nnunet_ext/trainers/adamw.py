"""AdamW in place of nnU-Net's SGD, for networks whose layers differ too much in their gradients for one step size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunet_ext.errors import UsageError

if TYPE_CHECKING:
    from nnunet_ext.protocols import HostTrainer
else:
    HostTrainer = object


class AdamWMixin(HostTrainer):
    """Trains with AdamW and nnU-Net's polynomial decay; place it before nnUNetTrainer.

    nnU-Net's SGD suits networks that normalise after each convolution. Where features are sums that nothing
    normalises, as the streams of reversible networks, training stops improving early (docs/methods/reversible.md).

    Attributes:
        learning_rate: At the start of the decay.
        adamw_weight_decay: Decoupled, per unit of learning rate (PyTorch's default).
    """

    learning_rate: float = 1e-3
    adamw_weight_decay: float = 1e-2

    def initialize(self) -> None:
        """Initialise as nnU-Net does, with this learning rate."""
        self.initial_lr = self.learning_rate
        self.weight_decay = self.adamw_weight_decay
        super().initialize()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """AdamW with nnU-Net's schedule."""
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def on_train_start(self) -> None:
        """Start as nnU-Net does.

        Raises:
            UsageError: the checkpoint that is continued has the memory of another optimiser.
        """
        continues = self.was_initialized and self.current_epoch < self.num_epochs
        if continues and "betas" not in self.optimizer.param_groups[0]:
            raise UsageError(
                f"{type(self).__name__} trains with AdamW, the checkpoint of epoch {self.current_epoch} that it "
                "continues holds the memory of another optimiser: end it with the version of this package that began "
                f"it, or move the checkpoints in {self.output_folder} away to train anew. Its weights can be given to "
                "-pretrained_weights; validation and prediction take it as it is."
            )
        super().on_train_start()
