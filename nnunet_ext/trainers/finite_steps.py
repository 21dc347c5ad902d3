"""What is not finite stays out of weights and statistics, and the log says where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nnunet_ext.errors import UsageError
from nnunet_ext.trainers.unwrapped import unwrapped

if TYPE_CHECKING:
    from nnunet_ext.protocols import HostTrainer
else:
    HostTrainer = object

_PATIENCE = 50  # bad steps of a network in a row, after which a training ends
_LINES = 5  # of single steps in the log of an epoch
_LEAST_SCALE = 2.0**-14  # of gradients; below it what float16 holds of them is noise, from 2^-127 on infinite


def or_nan(loss: Tensor, others: Sequence[Tensor] = ()) -> Tensor:
    """A loss whose gradient is NaN where it is not finite itself: an infinite cross-entropy has a finite one.

    Args:
        loss: Of no dimensions.
        others: (N,) each; where one of them is not finite, the loss and its gradient are NaN too.
    """
    return loss * torch.where(_are_finite([loss.detach().reshape(1), *others]), 1.0, torch.nan)


class FiniteStepsMixin(HostTrainer):
    """Trains on after a step whose loss, gradients or statistics are NaN or infinite, as if it had not been.

    On CUDA nnU-Net's gradient scaler leaves out steps whose gradients are not finite; elsewhere nnU-Net would make all
    weights NaN, and everywhere the running statistics of batch norm, which a finite image can make infinite. Where the
    stored image itself is at fault, of training or validation, or nothing else comes any more, the training ends.
    Waits for the device no more than nnU-Net does, which fetches each step's loss. Stands before ``nnUNetTrainer`` in
    the bases of a trainer.
    """

    _steps = _left_out = 0  # of this epoch; a cascade's branches take one each
    _told = 0  # validation batches of this epoch
    _is_dropped = False  # the present step, by `_before_step`
    _in_a_row: dict[int, int]  # network -> bad steps
    _scale: float | None = None  # of the gradients, at the start of the epoch
    _seen_by: Any = None  # the optimiser whose steps are looked at
    _statistics: tuple[list[Tensor], list[Tensor]] = ([], [])  # of batch norm: running, and before the present step

    def initialize(self) -> None:
        """Initialise as nnU-Net does."""
        super().initialize()
        self._in_a_row = {}
        if isinstance(getattr(self, "loss", None), nn.Module):
            self.loss.register_forward_hook(lambda _, __, loss: or_nan(loss, self._running))

    @property
    def _scales(self) -> bool:
        return self.grad_scaler is not None and self.grad_scaler.is_enabled()

    @property
    def _running(self) -> list[Tensor]:
        """Means and variances of batch norm."""
        return [x for x in self._statistics[0] if x.is_floating_point()]

    def on_train_epoch_start(self) -> None:
        """Start as nnU-Net does, and count anew."""
        super().on_train_epoch_start()
        self._steps = self._left_out = 0
        self._scale = self.grad_scaler.get_scale() if self._scales else None
        running = list(_running_statistics(self.network))
        self._statistics = running, [x.clone() for x in running]

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Train as nnU-Net does.

        Raises:
            UsageError: the stored image of a case is not finite, or no step has been for long.
        """
        if self._seen_by is not self.optimizer:
            self._seen_by = self.optimizer
            self.optimizer.register_step_pre_hook(self._before_step)
        running, kept = self._statistics
        if running:
            torch._foreach_copy_(kept, running)
        self._is_dropped = False
        result = super().train_step(batch)
        self._steps += 1
        has_loss = bool(np.isfinite(result["loss"]).all())
        if has_loss and not self._is_dropped:
            self._in_a_row[id(self.network)] = 0
            return result
        self._left_out += 1
        self._in_a_row[id(self.network)] = self._in_a_row.get(id(self.network), 0) + 1
        what = "gradient" if has_loss else "loss"
        if running:
            what = what if _are_finite(self._running) else "statistic of batch norm"
            torch._foreach_copy_(running, kept)
        self._explain(batch, what)
        return result

    def on_validation_epoch_start(self) -> None:
        """Start as nnU-Net does, and count anew."""
        super().on_validation_epoch_start()
        self._told = 0

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Validate as nnU-Net does.

        Raises:
            UsageError: the stored image of a case is not finite.
        """
        result = super().validation_step(batch)
        if not np.isfinite(result["loss"]).all():
            where = self._where(batch, self._damaged(batch))
            self._told += 1
            if self._told <= _LINES:
                self.print_to_log_file(f"The loss of a validation batch is NaN or infinite: {where}.")
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
        left_out, steps = self._over_ranks(self._left_out, self._steps)
        if left_out:
            self.print_to_log_file(
                f"{left_out} of {steps} steps changed nothing: loss or gradients were NaN or infinite."
            )
        if self._scale is not None and (scale := self.grad_scaler.get_scale()) < self._scale:
            self.print_to_log_file(
                f"Gradient scaler: from {self._scale:g} to {scale:g} in this epoch, each halving is a step left out."
            )
            self._check_scale()

    def _over_ranks(self, *counts: int) -> list[int]:
        """Sums over all ranks, of which one writes the log."""
        total = torch.tensor(counts, device=self.device)
        if self.is_ddp:
            dist.all_reduce(total)
        return total.tolist()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Without a gradient scaler: no gradients, no step."""
        if self._scales:
            return
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = [torch.linalg.vector_norm(p.grad) for p in trained]
        if norms and not torch.stack(norms).sum().isfinite():
            self._is_dropped = True
            for parameter in trained:
                parameter.grad = None

    def _check_scale(self) -> None:
        """See that float16 still holds something of the gradients.

        Raises:
            UsageError: too many steps were left out.
        """
        if self._scales and (scale := self.grad_scaler.get_scale()) < _LEAST_SCALE:
            raise UsageError(
                f"gradients in float16 need a scale of at least {_LEAST_SCALE:g}, got {scale:g} in epoch "
                f"{self.current_epoch}, after as many steps left out: the checkpoints in {self.output_folder} are "
                "whole. Continue from the last one (--c); where it comes back, train anew with a lower learning rate."
            )

    def _damaged(self, batch: dict[str, Any]) -> list[str]:
        """Cases of a batch whose images are not finite.

        Raises:
            UsageError: one of them is stored so.
        """
        finite = _whole(batch).isfinite().flatten(1).all(1).tolist()
        damaged = [key for key, is_finite in zip(_keys(batch), finite, strict=True) if not is_finite]
        for key in damaged:
            self._check_stored(key)
        return damaged

    def _where(self, batch: dict[str, Any], damaged: list[str]) -> str:
        if damaged:
            return f"augmentation of {', '.join(damaged)} gave NaN or infinity"
        largest = _whole(batch).abs().flatten(1).amax(1).tolist()
        value, key = max(zip(largest, _keys(batch), strict=True))
        return f"the batch is finite, its largest value is {value:.3g}, in {key}"

    def _explain(self, batch: dict[str, Any], what: str) -> None:
        damaged = self._damaged(batch)
        if damaged and self._scales and not self.is_ddp:  # no overflow; ranks must agree on a scale
            self.grad_scaler.update(self.grad_scaler.get_scale() / self.grad_scaler.get_backoff_factor())
        self._check_scale()
        in_a_row = self._in_a_row[id(self.network)]
        if in_a_row >= _PATIENCE:
            raise UsageError(
                f"a training needs finite losses and gradients, got others in {in_a_row} steps in a row, epoch "
                f"{self.current_epoch}: the checkpoints in {self.output_folder} are whole and none is of these steps. "
                "Continue from the last one (--c); where it comes back, train anew with a lower learning rate."
            )
        if self._left_out <= _LINES:
            self.print_to_log_file(f"A step is left out, its {what} is NaN or infinite: {self._where(batch, damaged)}.")

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


def _are_finite(numbers: Sequence[Tensor]) -> Tensor:
    return torch.cat([*numbers]).isfinite().all()


def _whole(batch: dict[str, Any]) -> Tensor:
    """(B, C, *patch) of the images that were loaded."""
    images: Tensor = batch.get("whole_patch", batch["data"])
    return images


def _keys(batch: dict[str, Any]) -> list[str]:
    """Name of each sample."""
    keys = [] if batch.get("keys") is None else [str(key) for key in batch["keys"]]
    return keys + [f"sample {i}" for i in range(len(keys), len(_whole(batch)))]


def _running_statistics(network: nn.Module) -> Iterator[Tensor]:
    for module in unwrapped(network).modules():
        if isinstance(module, _BatchNorm):
            yield from module.buffers(recurse=False)
