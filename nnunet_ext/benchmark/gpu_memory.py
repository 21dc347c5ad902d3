"""What a GPU needs for a method's training step, eager and compiled, and for its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from nnunet_ext.benchmark.counting import Builders
from nnunet_ext.benchmark.machine import Machine
from nnunet_ext.benchmark.measure import COMPILED, PATCH, STEP, inference
from nnunet_ext.benchmark.records import Method
from nnunet_ext.benchmark.request import BenchmarkRequest
from nnunet_ext.memory.gpu import measure_gpu_step


def measurements(request: BenchmarkRequest, method: Method) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield what can be measured of a method: its name, and what returns figures of `Method`.

    Args:
        request: What is measured, on a CUDA device.
        method: One with a memory budget is compiled only.
    """
    if method.budget is None:
        yield STEP, partial(_step, request, method, "measured")
    if request.compiles:
        yield COMPILED, partial(_step, request, method, "compiled")
    if method.budget is None:
        yield PATCH, partial(_inference, request, method)


def _step(request: BenchmarkRequest, method: Method, kind: str) -> dict[str, Any]:
    torch._dynamo.reset()  # what is compiled of one network would count in the limits of the next
    memory = measure_gpu_step(
        request.setting,
        method.trainer,
        mixed=request.machine.precision == "mixed",
        compiled=kind == "compiled",
        budget=method.budget,
    )
    figures = {f"{kind}_held_bytes": memory.held, f"{kind}_peak_bytes": memory.peak}
    return figures if kind == "compiled" else {**figures, "measured_reserved_bytes": memory.reserved}


def _inference(request: BenchmarkRequest, method: Method) -> dict[str, Any]:
    setting = request.setting
    build = Builders.of(request, method.trainer).deploy
    shape = (1, setting.input_channels, *setting.patch_size)
    return {"measured_inference_peak_bytes": measure_gpu_inference(build, shape, request.machine)}


def measure_gpu_inference(build: Callable[[], nn.Module], shape: Sequence[int], machine: Machine) -> int:
    """Measure the peak bytes of a forward pass, parameters included.

    Args:
        build: Returns the network, in eval mode.
        shape: (1, C, *patch) of the input.
        machine: A CUDA device.
    """
    work = inference(build().to(machine.kind), torch.randn(*shape, device=machine.kind), machine)
    work()
    machine.release()
    torch.cuda.reset_peak_memory_stats()
    work()
    machine.synchronize()
    return int(torch.cuda.max_memory_allocated())
