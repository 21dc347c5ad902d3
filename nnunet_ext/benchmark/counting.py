"""Size and memory of one trainer's network, counted on shapes: the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_ext.benchmark.memory import measure_inference, measure_step
from nnunet_ext.benchmark.records import Method
from nnunet_ext.benchmark.request import Request
from nnunet_ext.benchmark.size import count_parameters, deployed, measure_size
from nnunet_ext.printable import printable

_LONGEST_REASON = 300


@dataclass(frozen=True)
class Builders:
    """Functions that build a trainer's network.

    Args:
        train: for a training step.
        deploy: in the form that predicts.
    """

    train: Callable[[], nn.Module]
    deploy: Callable[[], nn.Module]

    def compiled(self) -> nn.Module:
        """Build the network for a training step, compiled where nnU-Net compiles."""
        network = self.train()
        network.compile()
        return network

    @classmethod
    def of(cls, request: Request, trainer: str) -> Builders:
        """Find the trainer.

        Raises:
            UsageError: it can't be loaded.
        """
        build = request.setting.training_builder(trainer)
        return cls(
            lambda: build().train(), deployed(request.setting.builder(trainer, deep_supervision=False))
        )


def count(request: Request, trainer: str) -> Method:
    """Count what can be counted of a method; the first failure is its reason, the rest is still tried."""
    method = Method(trainer)
    try:
        builders = Builders.of(request, trainer)
        method = replace(method, **_network(request, builders))
    except Exception as error:  # of any method, also a third party's: a row of the result
        return method.stopped("failed", one_line(error))
    for stage in (_deployed, _step, _inference):
        try:
            method = replace(method, **stage(request, builders))
        except Exception as error:
            method = method.stopped("failed", one_line(error))
    return method


def _network(request: Request, builders: Builders) -> dict[str, Any]:
    with FakeTensorMode():
        name = network_name(builders.train())
    return {"network": name, "parameters": count_parameters(builders.train)}


def _deployed(request: Request, builders: Builders) -> dict[str, Any]:
    setting = request.setting
    size = measure_size(builders.deploy, setting.input_channels, setting.patch_size)
    return {"parameters_deployed": size.parameters, "macs": size.macs}


def _step(request: Request, builders: Builders) -> dict[str, Any]:
    setting, dtype = request.setting, request.machine.counting_dtype
    memory = measure_step(
        builders.train, setting.input_channels, setting.patch_size, setting.batch_size, dtype
    )
    return {"held_bytes": memory.held, "peak_bytes": memory.peak}


def _inference(request: Request, builders: Builders) -> dict[str, Any]:
    setting, dtype = request.setting, request.machine.counting_dtype
    peak = measure_inference(builders.deploy, setting.input_channels, setting.patch_size, dtype)
    return {"inference_peak_bytes": peak}


def network_name(network: nn.Module) -> str:
    """Class of a network, also where it is wrapped for its training step."""
    return type(getattr(network, "trained_network", network)).__name__


def step_needs(request: Request, builders: Builders) -> int:
    """Bytes of a training step of the patch that is timed, with parameters and momentum."""
    setting, dtype = request.setting, request.machine.counting_dtype
    memory = measure_step(
        builders.train, setting.input_channels, request.timed_patch, setting.batch_size, dtype
    )
    return memory.peak + 2 * memory.parameters


def inference_needs(request: Request, builders: Builders) -> int:
    """Bytes of the forward pass of the patch that is timed, with parameters."""
    channels, dtype = request.setting.input_channels, request.machine.counting_dtype
    peak = measure_inference(builders.deploy, channels, request.timed_patch, dtype)
    return peak + 4 * count_parameters(builders.deploy)


def one_line(error: BaseException) -> str:
    """What an exception says, on one line; its type where it says nothing."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 3]}..."
