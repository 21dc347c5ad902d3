"""What is not finite stays out of weights and statistics, and the log says where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_ext.errors import UsageError
from nnunet_ext.trainers.unwrapped import unwrapped

if TYPE_CHECKING:
    from nnunet_ext.protocols import HostTrainer
else:
    HostTrainer = object

_PATIENCE = 50  # steps in a row without a finite loss, after which a training ends
_LINES = 5  # of single steps in the log of an epoch


class FiniteStepsMixin(HostTrainer):
    """Trains on after a step whose loss or gradients are NaN or infinite, as if it had not been.

    On CUDA nnU-Net's gradient scaler leaves such a step out; elsewhere nnU-Net would make all weights NaN, and
    everywhere the running statistics of batch norm. Where the image itself is at fault, the training ends: what is
    wrong on the disk comes back. Waits for the device no more than nnU-Net does, which fetches each step's loss.
    Stands before ``nnUNetTrainer`` in the bases of a trainer.
    """

    _left_out = 0  # steps of this epoch
    _in_a_row = 0  # steps without a finite loss
    _scale: float | None = None  # of the gradients, at the start of the epoch
    _statistics: Sequence[tuple[Tensor, Tensor]] = ()  # of batch norm: running, as at the start of the epoch

    def initialize(self) -> None:
        """Initialise as nnU-Net does, and look at gradients before the optimiser takes them."""
        super().initialize()
        self.optimizer.register_step_pre_hook(self._before_step)

    def on_train_epoch_start(self) -> None:
        """Start as nnU-Net does, and keep what a step can spoil beside the weights."""
        super().on_train_epoch_start()
        self._left_out = 0
        self._scale = None if self.grad_scaler is None else self.grad_scaler.get_scale()
        self._statistics = [(x, x.clone()) for x in _running_statistics(self.network)]

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Train as nnU-Net does.

        Raises:
            UsageError: the stored image of a case is not finite, or no loss has been for many steps.
        """
        result = super().train_step(batch)
        if np.isfinite(result["loss"]).all():
            self._in_a_row = 0
        else:
            self._in_a_row += 1
            self._left_out += self.grad_scaler is not None  # else counted before the optimiser's step
            self._restore_statistics()
            self._explain(batch)
        return result

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log as nnU-Net does, the mean of finite losses; and what was left out."""
        losses = [output["loss"] for output in train_outputs]
        finite = [loss for loss in losses if np.isfinite(loss).all()]
        if finite and len(finite) < len(losses):  # as many as before: ranks gather them
            mean = np.asarray(finite).mean(0).astype(np.asarray(losses[0]).dtype)
            train_outputs = [
                output if np.isfinite(output["loss"]).all() else {**output, "loss": mean} for output in train_outputs
            ]
        super().on_train_epoch_end(train_outputs)
        if self._left_out:
            self.print_to_log_file(
                f"{self._left_out} of {len(losses)} steps changed nothing: loss or gradients were NaN or infinite."
            )
        if self._scale is not None and (scale := self.grad_scaler.get_scale()) < self._scale:
            self.print_to_log_file(
                f"Gradient scaler: from {self._scale:g} to {scale:g} in this epoch, each halving is a step left out."
            )

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Without a gradient scaler: no gradients, no step."""
        if self.grad_scaler is not None:
            return
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = [torch.linalg.vector_norm(p.grad) for p in trained]
        if norms and not torch.stack(norms).sum().isfinite():
            self._left_out += 1
            for parameter in trained:
                parameter.grad = None

    def _restore_statistics(self) -> None:
        for running, kept in self._statistics:
            if not running.isfinite().all():
                running.copy_(kept)

    def _explain(self, batch: dict[str, Any]) -> None:
        images: Tensor = batch.get("whole_patch", batch["data"])
        finite = images.isfinite().flatten(1).all(1).tolist()
        keys = batch.get("keys")
        if keys is None:
            keys = ["(unknown)"] * len(finite)
        damaged = [str(key) for key, is_finite in zip(keys, finite, strict=True) if not is_finite]
        for key in damaged:
            self._check_stored(key)
        if self._in_a_row >= _PATIENCE:
            raise UsageError(
                f"a training needs finite losses, got NaN or infinity in {self._in_a_row} steps in a row, epoch "
                f"{self.current_epoch}: the checkpoints in {self.output_folder} are whole and older than this. "
                "Continue from the last one (--c); where it comes back, train anew with a lower learning rate."
            )
        if self._left_out <= _LINES:
            where = f"augmentation of {', '.join(damaged)} gave NaN or infinity" if damaged else "the batch is finite"
            self.print_to_log_file(f"A step is left out, its loss is NaN or infinite: {where}.")

    def _check_stored(self, key: str) -> None:
        """See whether the preprocessed image of a case is finite.

        Raises:
            UsageError: it is not.
        """
        folder = self.preprocessed_dataset_folder
        if self.dataset_class is None or key not in self.dataset_class.get_identifiers(folder):
            return  # not of this data set, as images without labels
        image = np.asarray(self.dataset_class(folder, [key]).load_case(key)[0][:])
        wrong = image.size - int(np.isfinite(image).sum())
        if wrong:
            raise UsageError(
                f"images must be finite, got NaN or infinity in {wrong} of {image.size} voxels of {key} in {folder}: "
                f"repair the raw image (nnunet-ext doctor --dataset {self.plans_manager.dataset_name} finds all such "
                "cases), preprocess again, then continue with --c; the checkpoints are whole."
            )


def _running_statistics(network: nn.Module) -> Iterator[Tensor]:
    for name, buffer in unwrapped(network).named_buffers():
        if buffer.is_floating_point() and name.rpartition(".")[2].startswith("running_"):
            yield buffer
