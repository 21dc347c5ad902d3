"""Memory of real training steps and forward passes on an NVIDIA GPU, as PyTorch's allocator reports it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nnunet_ext.benchmark.machine import Machine
from nnunet_ext.benchmark.timing import TrainingStep, inference


@dataclass(frozen=True)
class GpuStepMemory:
    """Memory of a training step.

    Args:
        held: bytes alive after the forward pass that were not before: input, outputs, what is kept for backward.
        peak: largest number of bytes allocated, with parameters, gradients and momentum.
        reserved: bytes that the allocator took from the GPU meanwhile.
    """

    held: int
    peak: int
    reserved: int


def measure_gpu_step(build: Callable[[], nn.Module], shape: Sequence[int], machine: Machine) -> GpuStepMemory:
    """Measure the second of two training steps: the first makes the momentum and lets cuDNN try its algorithms.

    Args:
        build: returns the network.
        shape: (B, C, *patch) of the input.
        machine: a CUDA device.
    """
    step = TrainingStep(build().train().to(machine.kind), machine)
    step.finish(step.forward(torch.randn(*shape, device=machine.kind)))
    machine.release()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = step.forward(torch.randn(*shape, device=machine.kind))
    held = torch.cuda.memory_allocated() - before
    step.finish(outputs)
    machine.synchronize()
    return GpuStepMemory(held, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


def measure_gpu_inference(build: Callable[[], nn.Module], shape: Sequence[int], machine: Machine) -> int:
    """Measure the peak bytes of a forward pass, parameters included.

    Args:
        build: returns the network, in eval mode.
        shape: (1, C, *patch) of the input.
        machine: a CUDA device.
    """
    work = inference(build().to(machine.kind), torch.randn(*shape, device=machine.kind), machine)
    work()
    machine.release()
    torch.cuda.reset_peak_memory_stats()
    work()
    machine.synchronize()
    return int(torch.cuda.max_memory_allocated())
