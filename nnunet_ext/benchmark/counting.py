"""What is counted of one trainer, the same on every machine: size, memory, memory against depth, passes.

Memory of training is that of the trainer's own step, with its loss and optimiser, in float16 autocast with CUDA's
dtypes: the count of `nnunet-ext estimate`, `compare` and the planners (`memory.count`), so that all of them say the
same number, and what a GPU's step can be held against. float32 comes second.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_ext.benchmark.records import DepthPoint, Method
from nnunet_ext.benchmark.request import BenchmarkRequest
from nnunet_ext.memory.compiled import held_when_compiled
from nnunet_ext.memory.count import training_memory
from nnunet_ext.memory.network import (
    count_parameters,
    deployed,
    measure_inference,
    measure_size,
    measure_step,
    network_name,
)
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.printable import one_line

BLOCKS = "blocks_per_stage"
STEP = 0.5  # share of the patch between two tiles, nnU-Net's default


@dataclass(frozen=True, kw_only=True)
class Builders:
    """Functions that build a trainer's network.

    Args:
        train: Builds the form of a training step.
        deploy: Builds the form that predicts.
    """

    train: Callable[[], nn.Module]
    deploy: Callable[[], nn.Module]

    def compiled(self) -> nn.Module:
        """Build the network for a training step, compiled where nnU-Net compiles."""
        network = self.train()
        network.compile()
        return network

    @classmethod
    def of(cls, request: BenchmarkRequest, trainer: str) -> Builders:
        """Find the trainer.

        Raises:
            UsageError: it can't be loaded.
        """
        build = request.setting.training_builder(trainer)
        return cls(
            train=lambda: build().train(), deploy=deployed(request.setting.builder(trainer, deep_supervision=False))
        )


def count(request: BenchmarkRequest, trainer: str) -> Method:
    """Count what can be counted of a method; the first failure is its reason, the rest is still tried."""
    method = Method(trainer=trainer)
    try:
        builders = Builders.of(request, trainer)
        method = replace(method, **_network(request, builders))
    except Exception as error:  # of any method, also a third party's: a row of the result
        return method.stopped("failed", one_line(error))
    for stage in (_deployed, _step, _step_in_float32, _inference):
        try:
            method = replace(method, **stage(request, trainer, builders))
        except Exception as error:
            method = method.stopped("failed", one_line(error))
    return method


def _network(request: BenchmarkRequest, builders: Builders) -> dict[str, Any]:
    with FakeTensorMode():
        name = network_name(builders.train())
    return {"network": name, "parameters": count_parameters(builders.train)}


def _deployed(request: BenchmarkRequest, trainer: str, builders: Builders) -> dict[str, Any]:
    setting = request.setting
    size = measure_size(builders.deploy, setting.input_channels, setting.patch_size)
    return {"parameters_deployed": size.parameters, "macs": size.macs}


def _step(request: BenchmarkRequest, trainer: str, builders: Builders) -> dict[str, Any]:
    memory = training_memory(request.setting, trainer)
    return {"held_bytes": memory.held, "peak_bytes": memory.peak, "expected_bytes": memory.expected}


def _step_in_float32(request: BenchmarkRequest, trainer: str, builders: Builders) -> dict[str, Any]:
    memory = training_memory(request.setting, trainer, mixed=False)
    return {"float32_held_bytes": memory.held, "float32_peak_bytes": memory.peak}


def _inference(request: BenchmarkRequest, trainer: str, builders: Builders) -> dict[str, Any]:
    setting = request.setting
    peak = measure_inference(builders.deploy, setting.input_channels, setting.patch_size, torch.float16)
    return {"inference_peak_bytes": peak + 4 * count_parameters(builders.deploy)}


def count_compiled(request: BenchmarkRequest, baseline: Method, share: float) -> Method:
    """The baseline compiled with a memory budget: what it holds; its peak is known where it is measured.

    Args:
        request: What is measured.
        baseline: Counted without.
        share: Budget.
    """
    method = replace(
        baseline,
        budget=share,
        held_bytes=None,
        peak_bytes=None,
        expected_bytes=None,
        float32_held_bytes=None,
        float32_peak_bytes=None,
    )
    try:
        held, in_float32 = (held_when_compiled(request.setting, baseline.trainer, share, m) for m in (True, False))
    except Exception as error:
        return method.stopped("failed", one_line(error))
    return replace(method, held_bytes=held, float32_held_bytes=in_float32)


def step_needs(request: BenchmarkRequest, builders: Builders) -> int:
    """Bytes of a training step of the patch that is timed, with parameters and momentum."""
    setting, dtype = request.setting, request.machine.counting_dtype
    memory = measure_step(builders.train, setting.input_channels, request.timed_patch, setting.batch_size, dtype)
    return memory.peak + 2 * memory.parameters


def inference_needs(request: BenchmarkRequest, builders: Builders) -> int:
    """Bytes of the forward pass of the patch that is timed, with parameters."""
    channels, dtype = request.setting.input_channels, request.machine.counting_dtype
    peak = measure_inference(builders.deploy, channels, request.timed_patch, dtype)
    return peak + 4 * count_parameters(builders.deploy)


def depth_key(setting: Setting, trainer: str) -> str | None:
    """How the depth of the trainer's network is set: by `BLOCKS`, by the plans' convolutions, or not at all.

    Args:
        setting: Holds the plans.
        trainer: Name; only nnU-Net's own is built from other plans, because others may not follow them.
    """
    with FakeTensorMode():
        network = setting.builder(trainer)()
    if BLOCKS in inspect.signature(type(network).__init__).parameters:
        return BLOCKS
    known = setting.configuration_manager.network_arch_init_kwargs
    names = [name for name in ("n_conv_per_stage", "n_blocks_per_stage") if name in known]
    return names[0] if names and trainer == "nnUNetTrainer" else None


def at_depth(setting: Setting, depth: int, key: str) -> Setting:
    """Change a copy of the plans to `depth` pairs of convolutions per stage, which 1 is nnU-Net's default.

    Args:
        setting: Holds the plans.
        depth: Reversible or residual blocks per stage, each of two convolutions, or pairs of plain ones.
        key: Argument of the plans that `depth_key` names.
    """
    configuration = setting.configuration_manager.configuration  # nnU-Net's own copy
    configuration.pop("inherits_from", None)
    arguments: dict[str, Any] = configuration["architecture"]["arch_kwargs"]
    if key == BLOCKS:
        arguments[BLOCKS] = depth
    else:
        stages = arguments["n_stages"]
        arguments[key] = [2 * depth if key == "n_conv_per_stage" else depth] * stages
        arguments["n_conv_per_stage_decoder"] = [2 * depth] * (stages - 1)
    configurations = {**setting.plans["configurations"], setting.configuration: configuration}
    return replace(setting, plans={**setting.plans, "configurations": configurations})


def count_depth(setting: Setting, trainer: str, depth: int, key: str) -> DepthPoint:
    """Count one point on shapes.

    Args:
        setting: Holds the plans.
        trainer: Name.
        depth, key: Arguments of `at_depth`.
    """
    deep = at_depth(setting, depth, key)
    build = deep.training_builder(trainer)
    memory = training_memory(deep, trainer)
    with FakeTensorMode():
        network = network_name(build())
    return DepthPoint(
        trainer=trainer,
        network=network,
        depth=depth,
        parameters=count_parameters(build),
        held_bytes=memory.held,
        peak_bytes=memory.peak,
    )


def tiles_per_case(setting: Setting) -> int | None:
    """Patches of one case of the configuration's median size; in 2D over all slices. None where it is not known."""
    patch = setting.patch_size
    median = setting.configuration_manager.configuration.get("median_image_size_in_voxels")
    shape = setting.plans.get("original_median_shape_after_transp")
    if not median or (len(patch) == 2 and not shape):
        return None
    slices = round(shape[0]) if len(patch) == 2 and shape else 1
    return slices * tiles(median[-len(patch) :], patch)


def tiles(image: Sequence[float], patch: Sequence[int]) -> int:
    """Patches that nnU-Net predicts an image from, without mirroring.

    Args:
        image, patch: Voxels along the axes of the patch.
    """
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

    # Smaller images are padded to the patch.
    padded = tuple(max(round(size), edge) for size, edge in zip(image, patch, strict=True))
    return math.prod(map(len, compute_steps_for_sliding_window(padded, tuple(patch), STEP)))


def passes_mirrored(setting: Setting) -> int:
    """Forward passes per patch with mirroring along all axes, as nnU-Net's trainers allow it by default."""
    return int(2 ** len(setting.patch_size))
