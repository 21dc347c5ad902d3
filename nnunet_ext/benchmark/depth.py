"""Memory of a training step against depth: reversible networks and default nnU-Net with the same convolutions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_ext.benchmark.counting import network_name
from nnunet_ext.benchmark.memory import measure_step
from nnunet_ext.benchmark.records import DepthPoint
from nnunet_ext.benchmark.setting import Setting
from nnunet_ext.benchmark.size import count_parameters

BLOCKS = "blocks_per_stage"


def depth_key(setting: Setting, trainer: str) -> str | None:
    """How the depth of the trainer's network is set: by `BLOCKS`, by the plans' convolutions, or not at all.

    Args:
        setting: holds the plans.
        trainer: name; only nnU-Net's own is built from other plans, because others may not follow them.
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
        setting: holds the plans.
        depth: reversible or residual blocks per stage, each of two convolutions, or pairs of plain ones.
        key: what `depth_key` says.
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


def measure_depth(
    setting: Setting, trainer: str, depth: int, key: str, autocast_dtype: torch.dtype | None
) -> DepthPoint:
    """Count one point on shapes.

    Args:
        setting: holds the plans.
        trainer: name.
        depth, key: as for `at_depth`.
        autocast_dtype: as for `measure_step`.
    """
    build: Callable[[], nn.Module] = at_depth(setting, depth, key).training_builder(trainer)
    patch, batch = setting.patch_size, setting.batch_size
    memory = measure_step(build, setting.input_channels, patch, batch, autocast_dtype)
    with FakeTensorMode():
        network = network_name(build())
    return DepthPoint(trainer, network, depth, count_parameters(build), memory.held, memory.peak)
