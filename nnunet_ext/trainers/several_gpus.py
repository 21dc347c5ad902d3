"""What nnU-Net's training on several GPUs lacks: refuse what would hang or crash, let a GPU be without a case."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from nnunet_ext.protocols import HostTrainer
else:
    HostTrainer = object


def is_first(trainer: HostTrainer) -> bool:
    """Whether this process is the one that writes: the first of all machines, where nnU-Net counts these."""
    rank: int = getattr(trainer, "global_rank", trainer.local_rank)
    return rank == 0


class SeveralGPUsMixin(HostTrainer):
    """For ``nnUNetv2_train -num_gpus``; stands before ``nnUNetTrainer`` in the bases of a trainer."""

    def run_training(self) -> None:
        """Train as nnU-Net does.

        Raises:
            ValueError: GPUs would have different numbers of samples where nnU-Net's Dice loss gathers them as one.
        """
        configuration, size = self.configuration_manager, dist.get_world_size() if self.is_ddp else 1
        if configuration.batch_dice and configuration.batch_size % size:
            raise ValueError(
                f"Plans with batch_dice need a batch size that the number of GPUs divides, got batch size "
                f"{configuration.batch_size} and {size} GPUs: give another -num_gpus, or change batch_size or "
                "batch_dice of this configuration in the plans."
            )
        super().run_training()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does.

        The first forward pass of DDP's wrapper after loading sends the first rank's buffers, as those of batch norm,
        to all, which by then are equal. A rank without a case makes no such pass: ``--val`` would hang.
        """
        if isinstance(self.network, DistributedDataParallel):
            self.network.require_forward_param_sync = False  # as after any pass without gradients
        super().perform_actual_validation(save_probabilities)
