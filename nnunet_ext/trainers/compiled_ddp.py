"""Networks with checkpoints, compiled and trained on several GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nnunet_ext.protocols import HostTrainer
else:
    HostTrainer = object


class CompiledCheckpointsMixin(HostTrainer):
    """Lets old versions of PyTorch compile a network with checkpoints under DDP; place it before nnUNetTrainer."""

    def initialize(self) -> None:
        """Initialise as nnU-Net does.

        PyTorch before 2.9 splits a compiled network by DDP's buckets, and refuses to where it holds checkpoints.
        """
        if self.is_ddp and self._do_i_compile() and torch.__version__ < "2.9":
            torch._dynamo.config.optimize_ddp = False
            self.print_to_log_file("PyTorch before 2.9: gradients of all GPUs are averaged after the backward pass.")
        super().initialize()
