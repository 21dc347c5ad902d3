"""The whole benchmark on tiny networks: what is in a row, and what one method's failure leaves of the others."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from nnunet_ext import registry
from nnunet_ext.benchmark import counting, gpu_memory
from nnunet_ext.benchmark import run as runner
from nnunet_ext.benchmark.counting import Builders, step_needs
from nnunet_ext.benchmark.machine import Machine
from nnunet_ext.benchmark.records import Method, Report, Spread
from nnunet_ext.benchmark.request import BASELINE, BenchmarkRequest
from nnunet_ext.errors import UsageError
from nnunet_ext.memory.count import training_memory
from nnunet_ext.memory.gpu import GpuStepMemory
from nnunet_ext.memory.network import count_parameters, measure_inference
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.source import Source
from tests.benchmark.trainers import trainer

if TYPE_CHECKING:
    from tests.conftest import Install

OURS = "nnUNetTrainerReversible"
ACME = "nnUNetTrainerAcme"
REAL_ONLY = "        if isinstance(x, FakeTensor): return super().forward(x)\n"
FORWARD = "    def forward(self, x):\n"


_counted: dict[str, Method] = {}
_really_count = runner.count


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two networks that most tests share are counted for the first of them."""

    def count(request: BenchmarkRequest, name: str) -> Method:
        if name not in (BASELINE, OURS):
            return _really_count(request, name)
        key = json.dumps([name, request.setting.plans, request.setting.configuration])
        if key not in _counted:
            _counted[key] = _really_count(request, name)
        return _counted[key]

    monkeypatch.setattr(runner, "count", count)


def rows(report: Report) -> dict[str, Method]:
    return {method.trainer: method for method in report.methods}


def test_row_holds_every_quantity_and_its_ratio(setting: Setting, machine: Machine) -> None:
    report = runner.run(BenchmarkRequest(setting, machine, (OURS,), repeats=2))
    baseline, ours = report.methods
    assert (baseline.trainer, baseline.network) == (BASELINE, "PlainConvUNet")
    assert (ours.trainer, ours.network, ours.status, ours.reason) == (OURS, "ReversibleUNet", "ok", "")
    memory = training_memory(setting, OURS)  # what `estimate` says
    assert (ours.held_bytes, ours.peak_bytes, ours.expected_bytes) == (memory.held, memory.peak, memory.expected)
    memory = training_memory(setting, OURS, mixed=False)
    assert (ours.float32_held_bytes, ours.float32_peak_bytes) == (memory.held, memory.peak)
    deployed = setting.builder(OURS, deep_supervision=False)
    inference = measure_inference(deployed, 1, (16, 16, 16), torch.float16)
    assert ours.inference_peak_bytes == inference + 4 * count_parameters(deployed)
    assert ours.parameters == ours.parameters_deployed == sum(p.numel() for p in deployed().parameters())
    for spread in (ours.step_seconds, ours.patch_seconds):
        assert spread is not None
        assert 0 < spread.min <= spread.median <= spread.max
    assert set(baseline.ratios.values()) == {1.0, None}
    missing = [key for key, ratio in baseline.ratios.items() if ratio is None]
    assert all(key.startswith(("measured", "compiled")) for key in missing)
    for key, ratio in ours.ratios.items():
        values = [getattr(method, key) for method in (ours, baseline)]
        values = [value.median if isinstance(value, Spread) else value for value in values]
        assert ratio == (None if values[0] is None else values[0] / values[1])


def test_all_registered_trainers_take_part_also_those_of_others(
    install: Install, setting: Setting, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme", trainer(ACME, "    pass"), trainers=[ACME])
    request = BenchmarkRequest(setting, machine, repeats=0)
    trained = [name for name in registry.names("trainers") if name != "nnUNetTrainerDeployed"]
    assert request.names == (BASELINE, *trained)
    assert request.shares == (0.5,)
    monkeypatch.setattr(registry, "names", lambda kind: (ACME,))
    report = runner.run(replace(request, budgets=()))
    assert list(rows(report)) == [BASELINE, ACME]
    acme = rows(report)[ACME]
    # One convolution of 1 -> 3 channels.
    assert (acme.network, acme.status, acme.parameters) == ("AcmeNet_", "ok", 3 * 27 + 3)
    assert acme.macs == 3 * 27 * 16**3


@pytest.mark.slow
def test_every_registered_trainer_is_measured(setting: Setting, machine: Machine) -> None:
    report = runner.run(BenchmarkRequest(setting, machine, repeats=0))
    assert {method.status for method in report.methods} == {"ok"}
    # All but one that only predicts, the baseline, and its row with a memory budget.
    assert len(report.methods) == len(registry.names("trainers")) + 1


def test_baseline_is_first_and_names_count_once(setting: Setting, machine: Machine) -> None:
    request = BenchmarkRequest(setting, machine, (OURS, BASELINE, OURS))
    assert request.names == (BASELINE, OURS)


def test_without_repeats_nothing_is_timed(setting: Setting, machine: Machine) -> None:
    report = runner.run(BenchmarkRequest(setting, machine, (), repeats=0))
    assert [(m.step_seconds, m.patch_seconds, m.case_seconds) for m in report.methods] == [(None, None, None)]


def test_compiled_steps_are_timed_beside_uncompiled_ones(
    install: Install, setting: Setting, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme", trainer(ACME, "    pass"), trainers=[ACME])
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    told: list[tuple[int, int, str]] = []
    request = BenchmarkRequest(setting, machine, (ACME,), repeats=1, compiled=True)
    torch._dynamo.utils.counters.clear()
    report = runner.run(request, lambda *news: told.append(news))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for method in report.methods:
        assert method.status == "ok"
        assert method.step_seconds is not None
        assert method.compiled_step_seconds is not None
        assert method.ratios["compiled_step_seconds"] is not None
    assert [what for *_, what in told][-4:] == [
        f"{name}: compiled training step" for name in (BASELINE, ACME) for _ in range(2)
    ]
    assert {total for _, total, _ in told} == {len(told)}


def test_compiler_that_fails_is_a_reason_and_the_other_times_stay(
    setting: Setting, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise RuntimeError("No compiler.")

    monkeypatch.setattr(torch, "compile", refuse)
    (method,) = runner.run(BenchmarkRequest(setting, machine, (), repeats=1, compiled=True)).methods
    assert (method.status, method.reason) == ("failed", "compiled training step: No compiler.")
    assert method.step_seconds is not None
    assert method.compiled_step_seconds is None


@pytest.mark.parametrize(
    ("kind", "repeats", "asked", "expected"),
    [
        ("cuda", 5, None, True),
        ("cpu", 5, None, False),
        ("cuda", 5, False, False),
        ("cpu", 5, True, True),
        ("cuda", 0, None, False),
    ],
)
def test_compiled_steps_are_timed_on_cuda_unless_asked_otherwise(
    kind: str, repeats: int, asked: bool | None, expected: bool, setting: Setting
) -> None:
    request = BenchmarkRequest(setting, Machine(kind, "mixed"), (), repeats, compiled=asked)
    assert request.times_compiled is expected


def test_turns_are_interleaved_and_all_progress_is_told(install: Install, setting: Setting, machine: Machine) -> None:
    install("acme", trainer(ACME, "    pass"), trainers=[ACME])
    told: list[tuple[int, int, str]] = []
    runner.run(BenchmarkRequest(setting, machine, (ACME,), repeats=1), lambda *news: told.append(news))
    a_round = [f"{name}: {what}" for name in (BASELINE, ACME) for what in ("training step", "inference of a patch")]
    assert [what for *_, what in told] == [f"{BASELINE}: counting", f"{ACME}: counting", *a_round, *a_round]
    assert [done for done, *_ in told] == list(range(10))
    assert {total for _, total, _ in told} == {10}


def test_times_of_a_case_are_tiles_times_the_median_of_a_patch(planned_dataset: Path, machine: Machine) -> None:
    setting = Source(dataset="7", configuration="3d_half").setting()
    report = runner.run(BenchmarkRequest(setting, machine, (), repeats=3))
    (method,) = report.methods
    assert (report.tiles_per_case, report.passes_mirrored) == (8, 8)
    assert method.patch_seconds is not None
    assert method.case_seconds == 8 * method.patch_seconds.median
    assert method.case_seconds_mirrored == 8 * 8 * method.patch_seconds.median


def test_smaller_patch_is_for_the_times_only(planned_dataset: Path, machine: Machine) -> None:
    setting = Source(dataset="7", configuration="3d_fullres").setting()
    full = runner.run(BenchmarkRequest(setting, machine, (), repeats=0))
    small = runner.run(BenchmarkRequest(setting, machine, (), repeats=1, time_patch=(8, 8, 8)))
    assert small.time_patch_size == (8, 8, 8)
    assert small.methods[0].peak_bytes == full.methods[0].peak_bytes
    assert small.methods[0].patch_seconds is not None
    assert small.methods[0].case_seconds is None


@pytest.mark.parametrize("exception", ["torch.OutOfMemoryError('CUDA out of memory')", "MemoryError()"])
def test_out_of_memory_is_a_row_and_the_others_go_on(
    exception: str, install: Install, setting: Setting, machine: Machine
) -> None:
    body = f"{FORWARD}{REAL_ONLY}        if self.training: raise {exception}\n        return super().forward(x)\n"
    install("acme", trainer(ACME, body), trainers=[ACME])
    report = rows(runner.run(BenchmarkRequest(setting, machine, (ACME,), repeats=1)))
    acme = report[ACME]
    assert acme.status == "out of memory"
    assert acme.reason.startswith("training step does not fit in ")
    assert acme.reason.endswith(" GB")
    assert acme.step_seconds is None
    assert acme.patch_seconds is not None
    assert acme.peak_bytes
    assert report[BASELINE].status == "ok"
    assert report[BASELINE].step_seconds


def test_what_would_not_fit_is_not_tried_on_the_cpu(
    setting: Setting, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = rows(runner.run(BenchmarkRequest(setting, machine, (OURS,), repeats=0)))
    request = BenchmarkRequest(setting, machine, (OURS,))
    needs = {name: step_needs(request, Builders.of(request, name)) for name in counted}
    assert needs[OURS] < needs[BASELINE]

    class Memory:
        available = needs[BASELINE] - 1

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    report = rows(runner.run(BenchmarkRequest(setting, machine, (OURS,), repeats=1)))
    assert report[BASELINE].status == "out of memory"
    assert report[BASELINE].reason == "training step does not fit in 0.0 GB: needs 0.0 GB"
    assert report[BASELINE].held_bytes == counted[BASELINE].held_bytes
    assert report[BASELINE].patch_seconds is not None
    assert (report[OURS].status, report[OURS].ratios["step_seconds"]) == ("ok", None)


def test_refusal_of_the_plan_is_a_row_with_the_reason(install: Install, setting: Setting, machine: Machine) -> None:
    body = "    def __init__(self, *args):\n        raise NotImplementedError('No 3D.\\nUse 2d.')\n"
    install("acme", trainer(ACME, body), trainers=[ACME])
    acme = rows(runner.run(BenchmarkRequest(setting, machine, (ACME,), repeats=1, depths=(1,))))[ACME]
    assert (acme.status, acme.reason, acme.network) == ("failed", "No 3D. Use 2d.", None)
    assert set(acme.ratios.values()) == {None}


def test_error_that_says_nothing_is_named_by_its_type(install: Install, setting: Setting, machine: Machine) -> None:
    body = f"{FORWARD}{REAL_ONLY}        raise RuntimeError\n"
    install("acme", trainer(ACME, body), trainers=[ACME])
    acme = rows(runner.run(BenchmarkRequest(setting, machine, (ACME,), repeats=1)))[ACME]
    assert (acme.status, acme.reason) == ("failed", "training step: RuntimeError")
    assert acme.macs


def test_broken_distribution_is_a_row_unless_it_is_asked_for(
    install: Install, setting: Setting, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = "nnUNetTrainerBroken"
    install("broken", "syntax error", trainers=[broken])
    request = BenchmarkRequest(setting, machine, repeats=0)
    assert broken in request.names
    monkeypatch.setattr(registry, "names", lambda kind: (broken,))
    row = rows(runner.run(request))[broken]
    assert row.status == "failed"
    assert "broken 1.0 can't be loaded" in row.reason
    with pytest.raises(UsageError, match="can't be loaded"):
        BenchmarkRequest(setting, machine, (broken,))


def test_deployed_form_is_what_predicts(install: Install, setting: Setting, machine: Machine) -> None:
    body = f"    def fuse(self):\n        return nn.Conv3d(1, 3, 1)\n{FORWARD}        return super().forward(x) * 1\n"
    install("acme", trainer(ACME, body), trainers=[ACME])
    acme = rows(runner.run(BenchmarkRequest(setting, machine, (ACME,), repeats=1)))[ACME]
    assert (acme.parameters, acme.parameters_deployed, acme.macs) == (84, 6, 3 * 16**3)
    # The image in float32 and float16, the map in float16; weights, and their copy in float16.
    assert acme.inference_peak_bytes == (4 + 2 + 3 * 2) * 16**3 + 6 * 4 + 6 * 2


def test_depth_grows_linearly_in_default_nnunet_and_not_in_reversible_networks(
    setting: Setting, machine: Machine
) -> None:
    before = str(setting.plans)
    report = runner.run(BenchmarkRequest(setting, machine, (OURS,), repeats=0, depths=(1, 2, 4)))
    assert str(setting.plans) == before
    held = {name: [p.held_bytes for p in report.depth if p.trainer == name] for name in (BASELINE, OURS)}
    per_block = held[BASELINE][1] - held[BASELINE][0]
    assert per_block > 0
    assert [h - held[BASELINE][0] for h in held[BASELINE]] == pytest.approx([0, per_block, 3 * per_block], rel=0.01)
    assert max(held[OURS]) < 1.05 * min(held[OURS])
    # nnU-Net's default is one pair of convolutions per stage.
    assert held[BASELINE][0] == report.methods[0].held_bytes
    assert report.depth[0].parameters == report.methods[0].parameters


def test_depth_of_residual_plans_is_in_blocks(setting: Setting, machine: Machine) -> None:
    configuration = dict(setting.plans["configurations"]["3d_fullres"])
    arguments = dict(configuration["architecture"]["arch_kwargs"])
    arguments["n_blocks_per_stage"] = [1] * len(arguments.pop("n_conv_per_stage"))
    name = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    configuration["architecture"] = {
        **configuration["architecture"],
        "network_class_name": name,
        "arch_kwargs": arguments,
    }
    residual = Setting(
        plans={**setting.plans, "configurations": {"r": configuration}}, dataset=setting.dataset, configuration="r"
    )
    points = runner.run(BenchmarkRequest(residual, machine, (OURS,), repeats=0, depths=(1, 2))).depth
    assert [(p.network, p.depth) for p in points] == [
        ("ResidualEncoderUNet", 1),
        ("ResidualEncoderUNet", 2),
        ("ReversibleUNet", 1),
        ("ReversibleUNet", 2),
    ]
    assert points[0].held_bytes < points[1].held_bytes
    assert points[2].held_bytes == points[3].held_bytes


def test_networks_without_the_option_have_no_depth(install: Install, setting: Setting, machine: Machine) -> None:
    install("acme", trainer(ACME, "    pass"), trainers=[ACME])
    points = runner.run(BenchmarkRequest(setting, machine, (ACME,), repeats=0, depths=(1,))).depth
    assert {point.trainer for point in points} == {BASELINE}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": -1}, "--repeats must be 0 or more, got -1"),
        ({"depths": (1, 0)}, "--depth needs numbers of 1 or more, got 0"),
        ({"budgets": (0.5, 1.5)}, "--budget needs shares between 0 and 1, got 1.5"),
        ({"trainers": ("nnUNetTrainerNobody",)}, "got nnUNetTrainerNobody: correct it"),
        ({"time_patch": (8, 8)}, "--time-patch needs 3 numbers, got 8 8"),
        ({"time_patch": (8, 8, 10)}, "divisible by 4 4 4 .*, got 8 8 10"),
        ({"time_patch": (4, 4, 4)}, "more than one voxel at the coarsest stage, got 4 4 4"),
        ({"time_patch": (8, 8, 0)}, "got 8 8 0"),
        ({"time_patch": (-8, -8, 8)}, "got -8 -8 8"),
    ],
)
def test_wrong_values_are_refused_before_anything_runs(
    options: dict[str, Any], message: str, setting: Setting, machine: Machine
) -> None:
    with pytest.raises(UsageError, match=message):
        BenchmarkRequest(setting, machine, **options)


class FakeGpu(Machine):
    """The CPU that passes for a GPU."""

    is_cuda = True
    name = "Fake GPU"

    def synchronize(self) -> None:
        pass

    def release(self) -> None:
        pass

    def room(self) -> int:
        return 80 * GIB


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    def step(setting: Setting, trainer: str, *, mixed: bool, compiled: bool, budget: float | None) -> GpuStepMemory:
        if trainer == BASELINE and not compiled:
            raise torch.OutOfMemoryError("CUDA out of memory")
        peak = 7 + 10 * mixed + 100 * compiled + 1000 * (budget is not None)
        return GpuStepMemory(held=peak - 1, peak=peak, reserved=9, outside=1)

    monkeypatch.setattr(gpu_memory, "measure_gpu_step", step)
    monkeypatch.setattr(gpu_memory, "measure_gpu_inference", lambda build, shape, machine: math.prod(shape))
    return FakeGpu("cpu", "float32")


def test_memory_of_the_gpu_stands_beside_what_is_counted(setting: Setting, gpu: FakeGpu) -> None:
    ours = rows(runner.run(BenchmarkRequest(setting, gpu, (OURS,), repeats=0)))[OURS]
    assert ours.peak_bytes == training_memory(setting, OURS).peak
    assert (ours.measured_held_bytes, ours.measured_peak_bytes, ours.measured_reserved_bytes) == (6, 7, 9)
    assert (ours.compiled_held_bytes, ours.compiled_peak_bytes) == (106, 107)
    assert ours.measured_inference_peak_bytes == 16**3


def test_only_what_is_asked_for_is_compiled(setting: Setting, gpu: FakeGpu) -> None:
    request = BenchmarkRequest(setting, FakeGpu("cpu", "mixed"), (OURS,), repeats=0, compiled=False)
    ours = rows(runner.run(request))[OURS]
    assert (ours.measured_peak_bytes, ours.compiled_peak_bytes) == (17, None)


def test_method_that_does_not_fit_on_the_gpu_keeps_its_counted_memory(setting: Setting, gpu: FakeGpu) -> None:
    report = rows(runner.run(BenchmarkRequest(setting, gpu, (OURS,), repeats=0)))
    baseline = report[BASELINE]
    assert (baseline.status, baseline.reason) == ("out of memory", "training step does not fit in 80.0 GB")
    assert baseline.held_bytes
    assert (baseline.measured_peak_bytes, baseline.compiled_peak_bytes) == (None, 107)
    assert report[OURS].ratios["held_bytes"] is not None
    assert report[OURS].ratios["measured_held_bytes"] is None


def test_budget_is_a_row_of_the_compiled_baseline(
    setting: Setting, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "held_when_compiled", lambda setting, trainer, share, mixed: 4 - 2 * mixed + share)
    told: list[tuple[int, int, str]] = []
    request = BenchmarkRequest(setting, gpu, (), repeats=0, budgets=(0.5,))
    baseline, row = runner.run(request, lambda *news: told.append(news)).methods
    assert row.label == "nnUNetTrainer (compiled, budget 0.5)"
    assert (row.trainer, row.network, row.parameters) == (BASELINE, baseline.network, baseline.parameters)
    assert (row.held_bytes, row.float32_held_bytes) == (2.5, 4.5)
    assert (row.peak_bytes, row.expected_bytes, row.float32_peak_bytes, row.measured_peak_bytes) == (None,) * 4
    assert (row.compiled_held_bytes, row.compiled_peak_bytes) == (1106, 1107)
    assert row.ratios["held_bytes"] == 2.5 / (baseline.held_bytes or 1)
    assert {total for _, total, _ in told} == {len(told)}


def test_row_with_a_budget_is_compiled_with_it(
    setting: Setting, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def compile_(*args: Any, **options: Any) -> Any:
        seen.append(torch._functorch.config.activation_memory_budget)
        return torch_compile(*args, **options, backend="eager")

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(runner, "count_compiled", lambda request, method, share: replace(method, budget=share))
    request = BenchmarkRequest(setting, machine, (), repeats=1, compiled=True, budgets=(0.3,))
    baseline, row = runner.run(request).methods
    assert seen == [1.0, 0.3]
    assert (row.step_seconds, row.patch_seconds) == (None, None)
    assert row.compiled_step_seconds is not None
    assert baseline.step_seconds is not None


def test_budget_that_can_not_be_counted_is_a_reason(
    setting: Setting, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> int:
        raise RuntimeError("No graph.")

    monkeypatch.setattr(counting, "held_when_compiled", refuse)
    _, row = runner.run(BenchmarkRequest(setting, machine, (), repeats=0, budgets=(0.5,))).methods
    assert (row.status, row.reason, row.held_bytes) == ("failed", "No graph.", None)


def test_first_reason_stays() -> None:
    method = Method(trainer="x").stopped("out of memory", "first").stopped("failed", "second")
    assert (method.status, method.reason) == ("out of memory", "first")
    assert replace(method, status="ok", reason="") == Method(trainer="x")
