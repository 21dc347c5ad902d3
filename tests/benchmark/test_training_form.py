"""Trainers whose step is more than one pass of the network are measured by their own step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nnunet_ext.architectures.expanded.partial_pass import ExpandedPass
from nnunet_ext.benchmark.counting import Builders, count
from nnunet_ext.benchmark.machine import Machine
from nnunet_ext.benchmark.measure import TrainingStep, training
from nnunet_ext.benchmark.request import BenchmarkRequest
from nnunet_ext.memory.count import training_memory
from nnunet_ext.memory.network import measure_step, surrogate_loss
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.source import Source
from nnunet_ext.trainers.passes import InTurn, TwoPasses

NAMES = ("nnUNetTrainerMeUNet", "nnUNetTrainerMeReversible")


def request_of(machine: Machine, setting: Setting) -> BenchmarkRequest:
    return BenchmarkRequest(setting, machine, NAMES, repeats=0)


@pytest.fixture(scope="module")
def full() -> Setting:
    """Default network at 48x48x48, counted on shapes only."""
    return Source(patch=(48, 48, 48)).setting()


@pytest.mark.parametrize("name", NAMES)
def test_the_peak_is_that_of_both_passes(name: str, machine: Machine, full: Setting) -> None:
    method = count(request_of(machine, full), name)
    assert (method.status, method.peak_bytes) == ("ok", training_memory(full, name).peak)
    assert method.network in ("PlainConvUNet", "ReversibleUNet")
    build = full.builder(name)
    peak = measure_step(full.training_builder(name), 1, full.patch_size, full.batch_size).peak
    expanded = measure_step(lambda: ExpandedPass(build()), 1, full.patch_size, full.batch_size)
    standard = measure_step(build, 1, (32, 32, 32), full.batch_size)
    image = 4 * full.batch_size * 48**3
    larger = max(expanded.peak, standard.peak)
    assert larger <= peak <= larger + standard.parameters + image
    assert peak < 0.6 * measure_step(build, 1, full.patch_size, full.batch_size).peak


def test_weights_of_both_passes_are_counted_once(machine: Machine, setting: Setting) -> None:
    ours, default = (count(request_of(machine, setting), name) for name in (NAMES[0], "nnUNetTrainer"))
    assert ours.parameters == default.parameters is not None


def test_a_timed_step_runs_both_passes_on_any_patch(machine: Machine, setting: Setting) -> None:
    network = Builders.of(request_of(machine, setting), NAMES[0]).train()
    assert isinstance(network, TwoPasses)
    shapes: list[tuple[int, ...]] = []
    network.expanded_pass.deep.register_forward_hook(lambda m, x, y: shapes.append(tuple(x[0].shape[2:])))
    network.trained_network.register_forward_hook(lambda m, x, y: shapes.append(tuple(x[0].shape[2:])))
    step = TrainingStep(network, machine)
    outputs = step.forward(torch.randn(2, 1, 24, 24, 24))
    # Level 2 of kP, and P; what runs the former is a shallow copy of the network, with the same hooks.
    assert list(dict.fromkeys(shapes)) == [(12, 12, 12), (16, 16, 16)]
    assert any(p.grad is not None and p.grad.any() for p in network.expanded_pass.deep.parameters())
    step.finish(outputs)


@pytest.mark.parametrize("name", [*NAMES, "nnUNetTrainerMeCascade"])
def test_every_pass_of_a_timed_step_is_scaled_and_compiled(
    name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine("cpu", "float32")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    monkeypatch.setattr(Machine, "gradient_scaler", lambda self: scaler)
    scaled: list[float] = []
    scale = scaler.scale
    monkeypatch.setattr(scaler, "scale", lambda loss: scaled.append(loss.item()) or scale(loss))
    compiled: list[str] = []

    def note(module: Any) -> Any:
        compiled.append(type(getattr(module, "__self__", module)).__name__)
        return module

    monkeypatch.setattr(torch, "compile", note)
    network = Builders.of(request_of(machine, setting), name).compiled()
    training(network, torch.randn(2, 1, 32, 32, 32), machine)()
    branches = len(getattr(network.trained_network, "branches", [None]))
    assert len(scaled) == 2 * branches
    assert compiled.count("Sequential") == branches  # the first of the two parts of each expanded pass
    assert len(compiled) == 3 * branches


def test_where_nothing_is_expanded_the_step_is_the_networks(machine: Machine, setting: Setting) -> None:
    setting.plans["configurations"]["3d_fullres"]["me_unet"] = {"k": 1}
    built = Builders.of(request_of(machine, setting), NAMES[0]).train()
    assert isinstance(built, nn.Module)
    assert not isinstance(built, TwoPasses)


def test_the_cascades_first_stage_peaks_like_its_larger_branch(full: Setting) -> None:
    full.plans["configurations"]["3d_fullres"]["me_unet"] = {"k": 1.5}
    cascade, alone = (training_memory(full, name) for name in ("nnUNetTrainerMeCascade", "nnUNetTrainerMeUNet"))
    # Weights, momentum and gradients of two networks, whose branches run in turn.
    weights = cascade.parameters + cascade.optimizer + cascade.gradients
    assert weights == pytest.approx(2 * (alone.parameters + alone.optimizer + alone.gradients), rel=0.01)
    assert cascade.peak - weights == pytest.approx(alone.peak - weights / 2, rel=0.15)


def test_a_timed_step_of_the_cascade_trains_both_branches_on_any_patch(machine: Machine, setting: Setting) -> None:
    network = Builders.of(
        BenchmarkRequest(setting, machine, ("nnUNetTrainerMeCascade",), repeats=0), "nnUNetTrainerMeCascade"
    )
    form = network.train()
    assert isinstance(form, InTurn)
    surrogate_loss(form(torch.randn(2, 1, 32, 32, 32))).backward()
    assert all(parameter.grad is not None for parameter in form.parameters())
