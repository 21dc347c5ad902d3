"""Memory of a training on an NVIDIA GPU, counted on shapes: what all commands say and the planners plan with.

The step of the trainer runs under PyTorch's fake tensors with the dtypes of CUDA's autocast (`memory.autocast`), not
compiled. What is not a tensor of PyTorch is an allowance. Three words: *held* is alive after the forward pass, *peak*
the most at any time of a step, *expected* the peak with the allowance (docs/reference/memory.md).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nnunet_ext.memory.autocast import CudaAutocast
from nnunet_ext.memory.tracker import GIB, StorageTracker
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.teacher import VARIABLE
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.protocols import HasTeacher

# The allowance; assumed, not yet measured on a GPU (docs/reference/memory.md).
CONTEXT_BYTES = GIB // 2  # CUDA context, cuDNN and cuBLAS
FRAGMENTED_SHARE = 0.05  # of the peak: what PyTorch's allocator reserves beyond it


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of a training.

    Args:
        parameters: Weights and buffers of the network, and of one that teaches it.
        gradients: Gradients of the weights.
        optimizer: State of the optimiser.
        held: Images, labels, what is kept for backward and loss: alive after the forward pass in addition to weights
            and optimiser. Of several passes the largest.
        peak: The most that tensors need at any time of a step, all of the above included where alive.
        workspace: Copies of input and output of the largest convolution, which cuDNN makes in the layout of its
            tensor cores.
    """

    parameters: int
    gradients: int
    optimizer: int
    held: int
    peak: int
    workspace: int

    @property
    def allowance(self) -> int:
        """Bytes for what is no tensor: context, workspaces, fragmentation."""
        return CONTEXT_BYTES + self.workspace + round(FRAGMENTED_SHARE * self.peak)

    @property
    def expected(self) -> int:
        """What the GPU must have: peak and allowance."""
        return self.peak + self.allowance

    def as_dict(self) -> dict[str, int]:
        """All figures, for JSON."""
        return {**asdict(self), "allowance": self.allowance, "expected": self.expected}


class StepTracker(StorageTracker):
    """Follows a trainer's step, notes its largest convolution, answers questions for values that shapes can't tell.

    Attributes:
        largest_convolution: Bytes of its input and output.
        operations: Multiply-accumulate operations of convolutions and matrix products so far, backward ones too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest_convolution = 0
        self.operations = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        result = func(*args, **(kwargs or {}))
        # Everything was made in this mode, so that views are known by their storage.
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        if (count := flop_registry.get(getattr(func, "overloadpacket", None))) is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=result) // 2
        if func is torch.ops.aten.convolution.default:
            self.largest_convolution = max(self.largest_convolution, _bytes(args[0]) + _bytes(result))
        return result


def _bytes(x: Tensor) -> int:
    return prod(x.shape) * x.element_size()


def training_memory(setting: Setting, trainer: str, mixed: bool = True) -> TrainingMemory:
    """Count the memory of a training; asked again for the same, it remembers.

    Args:
        setting: Plans, data set and configuration.
        trainer: Name, also of nnU-Net's own and with a schedule's suffix.
        mixed: Whether in float16 autocast with the dtypes of CUDA, or in float32.

    Raises:
        UsageError: no trainer has this name.
    """
    return count_memory(setting, trainer, setting.batch_size, mixed)


def count_memory(setting: Setting, trainer: str, batch_size: int, mixed: bool = True) -> TrainingMemory:
    """Count the memory of a training at this batch size, whatever the plans say.

    Args:
        setting, trainer, mixed: Arguments of `training_memory`.
        batch_size: Patches per step.
    """
    return _of_step(setting, trainer, batch_size, mixed)[0]


def training_operations(setting: Setting, trainer: str) -> int:
    """Count the multiply-accumulate operations of a training step, what is recomputed included.

    Args:
        setting, trainer: Arguments of `training_memory`, with which it is counted.
    """
    return _of_step(setting, trainer, setting.batch_size, True)[1]


def _of_step(setting: Setting, trainer: str, batch_size: int, mixed: bool) -> tuple[TrainingMemory, int]:
    setting.check_code()
    plans, dataset = json.dumps(setting.plans), json.dumps(setting.dataset)
    teacher = os.environ.get(VARIABLE, "") if isinstance(trainer_class(trainer), HasTeacher) else ""
    return _counted(plans, dataset, setting.configuration, trainer, batch_size, mixed, teacher)


@lru_cache(maxsize=1024)
def _counted(
    plans: str, dataset: str, configuration: str, trainer: str, batch_size: int, mixed: bool, teacher: str
) -> tuple[TrainingMemory, int]:
    from nnunet_ext.memory.step import TrainerStep

    content = json.loads(plans)
    content["configurations"][configuration]["batch_size"] = batch_size
    setting = Setting(
        plans=content, dataset=json.loads(dataset), configuration=configuration, trusted=True
    )  # checked before
    form = setting.training_form(trainer)  # reads the checkpoint of a teacher, which is not to be counted
    with torch.device("cpu"), FakeTensorMode(), CudaAutocast(), StepTracker() as tracker:
        step = TrainerStep(setting, trainer, mixed=mixed, form=form)
        parameters = tracker.current
        step.make_state()
        always = tracker.peak = tracker.current
        tracker.operations = held = 0
        for _ in step.passes():
            held = max(held, tracker.current - always)
        gradients = sum(_bytes(p) for p in step.parameters if p.requires_grad)
        memory = TrainingMemory(
            parameters=parameters,
            gradients=gradients,
            optimizer=always - parameters,
            held=held,
            peak=tracker.peak,
            workspace=tracker.largest_convolution,
        )
        return memory, tracker.operations
