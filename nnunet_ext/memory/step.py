"""One training step of any trainer: its network, its loss, its optimiser, in the order in which nnU-Net runs them.

Images and labels are random. What a trainer does in addition on the GPU (augmentation, metrics) is not run. Its
`initialize` is not called and its folders are not made; a step that is more than one pass of the network is what its
`training_form` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from nnunet_ext.memory.autocast import mixed_precision
from nnunet_ext.memory.network import training_outputs
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.protocols import SeveralPasses


class _WithoutFolders(nnUNetTrainer):
    """What nnU-Net's trainer sets in `__init__`, without folders and log files: the last base of `_quiet`."""

    def __init__(
        self, plans: dict[str, Any], configuration: str, fold: int, dataset_json: dict[str, Any], device: Any
    ) -> None:
        setting = Setting(plans=plans, dataset=dataset_json, configuration=configuration)
        self.device, self.is_ddp, self.local_rank, self.fold = device, False, 0, fold
        self.plans_manager, self.configuration_manager = setting.plans_manager, setting.configuration_manager
        self.configuration_name, self.dataset_json = configuration, dataset_json
        self.label_manager = self.plans_manager.get_label_manager(dataset_json)
        self.initial_lr, self.weight_decay, self.num_epochs = 1e-2, 3e-5, 1000
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 250, 50
        self.oversample_foreground_percent, self.current_epoch, self.save_every = 0.33, 0, 50
        self.enable_deep_supervision = True
        self.network = self.loss = self.optimizer = self.lr_scheduler = None

    def print_to_log_file(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""

    def _do_i_compile(self) -> bool:
        return False


def _quiet(trainer: type[Any]) -> type[Any]:
    """The trainer, with `_WithoutFolders` in the place of nnU-Net's `__init__`."""
    return _WithoutFolders if trainer is nnUNetTrainer else type(trainer.__name__, (trainer, _WithoutFolders), {})


class TrainerStep:
    """A training step that can be run again and again.

    Args:
        setting: Plans, data set and configuration.
        trainer: Name, also of nnU-Net's own and with a schedule's suffix.
        device: "cpu" for fake tensors, or "cuda".
        mixed: Whether the step runs in float16 autocast, as nnU-Net trains on CUDA, or in float32.
        compiler: Compiles in place what the step runs; None: nothing is compiled.
        form: What `Setting.training_form` gives, where it must not be asked in the mode of the caller.

    Attributes:
        parameters: Parameters of the network, all of them.

    Raises:
        UsageError: no trainer has this name.
    """

    def __init__(
        self,
        setting: Setting,
        trainer: str,
        device: str = "cpu",
        *,
        mixed: bool = True,
        compiler: Callable[[nn.Module], None] | None = None,
        form: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        self._setting, self._device, self._mixed = setting, device, mixed
        found = _quiet(trainer_class(trainer))
        self._trainer = found(
            dict(setting.plans), setting.configuration, 0, dict(setting.dataset), torch.device(device)
        )
        network = setting.builder(trainer, self._trainer.enable_deep_supervision)().train()
        self._trainer.network = network
        self.parameters = list(network.parameters())
        self._form = (form or setting.training_form(trainer))(network)
        if device != "cpu":  # and what comes with the form
            self._form.to(device)
        if compiler is not None:
            compiler(self._form)
        self._optimizer = self._trainer.configure_optimizers()[0]
        for group in self._optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = True  # as on CUDA, where it is the default
        # A fake one would take the step for one that overflowed, and leave out the optimiser.
        self._scaler = torch.amp.GradScaler(device, enabled=mixed and device != "cpu")

    def make_state(self) -> None:
        """Let the optimiser make its state, as in the first step of a training."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def passes(self) -> Iterator[Tensor]:
        """Yield the loss of each pass before its backward pass; those of meU-net run one after the other."""
        x, targets = self._batch()
        for part, data in passes_of(self._form, x):
            with mixed_precision(self._device, self._mixed):
                outputs = training_outputs(part, data)
                loss = self._loss(outputs, targets)
            yield loss
            self._scaler.scale(loss).backward()
            del outputs, loss
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, 12)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)

    def _batch(self) -> tuple[Tensor, dict[tuple[int, ...], Tensor]]:
        """Images, and labels at the scales of deep supervision by their size."""
        setting = self._setting
        batch, patch = setting.batch_size, setting.patch_size
        x = torch.randn(batch, setting.input_channels, *patch, device=self._device)
        scales = self._trainer._get_deep_supervision_scales() or [[1.0] * len(patch)]
        sizes = [tuple(round(n * s) for n, s in zip(patch, scale, strict=True)) for scale in scales]
        return x, {size: self._labels(size) for size in sizes}

    def _labels(self, size: Sequence[int]) -> Tensor:
        manager = self._trainer.label_manager
        channels, values, dtype = 1, len(manager.all_labels), torch.int16
        if manager.has_regions:
            channels = len(manager.foreground_regions) + (manager.ignore_label is not None)
            values, dtype = 2, torch.bool
        shape = (self._setting.batch_size, channels, *size)
        return torch.randint(values, shape, dtype=dtype, device=self._device)

    def _loss(self, outputs: Any, targets: dict[tuple[int, ...], Tensor]) -> Tensor:
        """The trainer's own loss, also of only one level."""
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        several = isinstance(logits, (list, tuple))
        self._trainer.enable_deep_supervision = several
        with np.errstate(invalid="ignore"):  # nnU-Net's weights of a single scale are 0 / 0
            loss: nn.Module = self._trainer._build_loss()
        found = [
            targets[size] if (size := tuple(level.shape[2:])) in targets else self._labels(size)
            for level in (logits if several else [logits])
        ]
        value: Tensor = loss(outputs, found if several else found[0])
        return value


def passes_of(form: nn.Module, x: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield what has a backward pass of its own in a training step, with its input; most trainers have one.

    Args:
        form: What the trainer's `training_form` gives, or the network itself.
        x: (B, C, *patch).
    """
    if isinstance(form, SeveralPasses):
        yield from form.passes(x)
    else:
        yield form, x
