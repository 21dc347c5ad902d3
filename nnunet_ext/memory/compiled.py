"""`torch.compile` with a memory budget: the rival that recomputes what the compiler chooses.

PyTorch's `activation_memory_budget` is the share that a compiled network may keep of what it would keep for its
backward pass; the rest is recomputed. The choice is made on the graph before any code is generated, so that what is
held can be counted on shapes. The peak can't: it depends on which operations the compiler fuses, and is measured on a
GPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch._functorch import config
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_ext.memory.autocast import CudaAutocast
from nnunet_ext.memory.count import StepTracker
from nnunet_ext.memory.step import TrainerStep
from nnunet_ext.nnunet.setting import Setting

DEFAULT_BUDGET = 0.5


def memory_budget(share: float | None) -> Any:
    """Context in which networks are compiled with this budget; None: all that speed asks for is kept.

    Args:
        share: Of the bytes that a compiled network would keep.
    """
    return config.patch(activation_memory_budget=1.0 if share is None else share)


def held_when_compiled(setting: Setting, trainer: str, share: float, mixed: bool = True) -> int:
    """Count what is held after the forward pass of a trainer's compiled step, as `TrainingMemory.held`.

    Args:
        setting, trainer, mixed: Arguments of `training_memory`; a trainer whose step is one pass of its network.
        share: Budget.

    Raises:
        UsageError: no trainer has this name.
    """
    setting.check_code()
    with memory_budget(share), torch.device("cpu"), FakeTensorMode(), CudaAutocast(), StepTracker() as tracker:
        step = TrainerStep(setting, trainer, mixed=mixed, compiler=_cut_in_two)
        for _ in step.passes():  # traces
            pass
        step.make_state()
        before = tracker.current
        return max(tracker.current - before for _ in step.passes())


def _cut_in_two(network: nn.Module) -> None:
    """Let a network run the graphs of forward and backward that `torch.compile` would generate code from."""
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    weights = dict(network.named_parameters())
    forward = network.forward

    def traced(weights: Any, x: Any) -> Any:
        network.forward = forward
        try:
            return torch.func.functional_call(network, weights, (x,))
        finally:
            network.forward = compiled

    def as_it_is(gm: Any, example_inputs: Any) -> Any:
        return make_boxed_func(gm)

    run = aot_function(
        traced,
        fw_compiler=as_it_is,
        bw_compiler=as_it_is,
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )

    def compiled(x: Any) -> Any:
        return run(weights, x)

    network.forward = compiled
