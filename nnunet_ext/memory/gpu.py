"""Memory of a training step measured on an NVIDIA GPU, in the words of `memory.count`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nnunet_ext.memory.compiled import memory_budget
from nnunet_ext.memory.step import TrainerStep
from nnunet_ext.nnunet.setting import Setting


@dataclass(frozen=True, kw_only=True)
class GpuStepMemory:
    """What a real step took of a GPU, in bytes.

    Args:
        held: Alive after the forward pass that was not before; of several passes the largest.
        peak: Most that PyTorch's allocator had in use: tensors, and workspaces of cuDNN and cuBLAS.
        reserved: Most that the allocator held of the GPU.
        outside: In use of the GPU in addition afterwards: CUDA's context, libraries, other programs.
    """

    held: int
    peak: int
    reserved: int
    outside: int


def measure_gpu_step(
    setting: Setting, trainer: str, *, mixed: bool = True, compiled: bool = False, budget: float | None = None
) -> GpuStepMemory:
    """Measure the second of two real steps; the first compiles, and lets cuDNN try its algorithms.

    Args:
        setting: Plans, data set and configuration.
        trainer: Name, also of nnU-Net's own and with a schedule's suffix.
        mixed: Whether in float16 autocast, or in float32.
        compiled: Whether what the step runs is compiled, as nnU-Net does by default.
        budget: Argument of `memory_budget` for a compiled step.

    Raises:
        UsageError: no trainer has this name.
    """
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), memory_budget(budget):
        step = TrainerStep(setting, trainer, "cuda", mixed=mixed, compiler=_compile if compiled else None)
        step.make_state()
        held = 0
        for _ in range(2):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            held = max(torch.cuda.memory_allocated() - before for _ in step.passes())
        torch.cuda.synchronize()
        free, size = torch.cuda.mem_get_info()
        return GpuStepMemory(
            held=held,
            peak=torch.cuda.max_memory_allocated(),
            reserved=torch.cuda.max_memory_reserved(),
            outside=size - free - torch.cuda.memory_reserved(),
        )


def _compile(form: nn.Module) -> None:
    form.compile()
