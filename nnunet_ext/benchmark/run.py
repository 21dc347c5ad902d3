"""Measures the networks of several trainers next to default nnU-Net, on the same plan and in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version

import torch

from nnunet_ext.benchmark.counting import (
    Builders,
    count,
    count_compiled,
    count_depth,
    depth_key,
    inference_needs,
    passes_mirrored,
    step_needs,
    tiles_per_case,
)
from nnunet_ext.benchmark.gpu_memory import measurements
from nnunet_ext.benchmark.machine import DoesNotFitError, gigabytes, is_out_of_memory
from nnunet_ext.benchmark.measure import COMPILED, PATCH, STEP, Subject, inference, interleave, training
from nnunet_ext.benchmark.records import DepthPoint, Method, Report, Spread
from nnunet_ext.benchmark.request import BASELINE, BenchmarkRequest
from nnunet_ext.errors import UsageError
from nnunet_ext.memory.compiled import memory_budget
from nnunet_ext.printable import one_line

# done, total, what comes next
OnProgress = Callable[[int, int, str], None]


def run(request: BenchmarkRequest, on_progress: OnProgress = lambda done, total, what: None) -> Report:
    """Measure; whatever one method fails at is in its row, and the others go on.

    Args:
        request: What is measured.
        on_progress: Called before every piece of work.

    Raises:
        UsageError: not one network can be built.
    """
    return _Run(request, on_progress).report()


class _Run:
    """One benchmark: the request, the methods so far, and how much is done."""

    def __init__(self, request: BenchmarkRequest, on_progress: OnProgress) -> None:
        self._request = request
        self._setting = request.setting
        self._machine = request.machine
        self._on_progress = on_progress
        self._done = 0
        rounds = request.repeats + 1 if request.repeats else 0
        each = 1 + self._machine.is_cuda + request.times_compiled * rounds
        self._total = len(request.names) * (each + 2 * rounds + len(request.depths)) + len(request.shares) * each
        self._methods = {name: Method(trainer=name) for name in request.names}

    def report(self) -> Report:
        """Count, measure on the GPU, time, then count depths."""
        for name in self._methods:
            self._next(f"{name}: counting")
            self._methods[name] = count(self._request, name)
        if not self._built():
            reason = self._methods[BASELINE].reason
            raise UsageError(
                f"no network can be built from the plans {self._setting.plans.get('plans_name', '')}, "
                f"{self._setting.configuration} ({reason}): plan the data set again, or name other trainers (-tr)."
            )
        for share in self._request.shares if self._methods[BASELINE].network else ():
            self._next(f"{BASELINE}: counting with a memory budget")
            method = count_compiled(self._request, self._methods[BASELINE], share)
            self._methods[method.label] = method
        with self._machine.settings():
            if self._machine.is_cuda:
                for name in self._built():
                    self._next(f"{name}: memory on the GPU")
                    self._measure(name)
            if self._request.repeats:
                self._time()
        depth = tuple(point for name in self._built() if name in self._request.names for point in self._depth(name))
        setting, baseline = self._setting, self._methods[BASELINE]
        return Report(
            device=self._machine.name,
            torch=torch.__version__,
            nnunetv2=version("nnunetv2"),
            precision=self._machine.precision,
            plans=str(setting.plans.get("plans_name", "")),
            configuration=setting.configuration,
            patch_size=setting.patch_size,
            batch_size=setting.batch_size,
            input_channels=setting.input_channels,
            num_classes=setting.num_classes,
            time_patch_size=self._request.timed_patch,
            repeats=self._request.repeats,
            tiles_per_case=tiles_per_case(setting),
            passes_mirrored=passes_mirrored(setting),
            methods=tuple(method.compared(baseline) for method in self._methods.values()),
            depth=depth,
        )

    def _next(self, what: str) -> None:
        self._on_progress(self._done, self._total, what)
        self._done += 1

    def _built(self) -> list[str]:
        """Methods whose network can be built."""
        return [name for name, method in self._methods.items() if method.network]

    def _measure(self, name: str) -> None:
        """Measure the memory of a method on the GPU, as far as it fits."""
        for what, measure in measurements(self._request, self._methods[name]):
            self._machine.release()
            failure = None
            try:
                figures = measure()
            except Exception as error:
                failure = error.with_traceback(None)  # which would keep tensors
            self._machine.release()
            if failure is None:
                self._methods[name] = replace(self._methods[name], **figures)
            else:
                self._stop(name, what, failure)

    def _stop(self, name: str, what: str, error: Exception) -> None:
        """Note why a part of a method has no figure."""
        method = self._methods[name]
        if isinstance(error, DoesNotFitError):
            self._methods[name] = method.stopped("out of memory", f"{what} {error}")
        elif is_out_of_memory(error):
            reason = f"{what} does not fit in {gigabytes(self._machine.room())}"
            self._methods[name] = method.stopped("out of memory", reason)
        else:
            self._methods[name] = method.stopped("failed", f"{what}: {one_line(error)}")

    def _time(self) -> None:
        subjects = {(name, what): subject for name in self._built() for what, subject in self._subjects(name)}
        compiled = {key: subjects.pop(key) for key in list(subjects) if key[1] == COMPILED}
        self._interleave(subjects)
        for key, subject in compiled.items():
            # Alone, as in a training: what is compiled of one network would count in the limits of the next.
            torch._dynamo.reset()
            with memory_budget(self._methods[key[0]].budget):
                self._interleave({key: subject})
            torch._dynamo.reset()

    def _interleave(self, subjects: Mapping[tuple[str, str], Subject]) -> None:
        """Time subjects in turn; note their times, or why there are none."""

        def on_turn(name: str, what: str) -> None:
            self._next(f"{name}: {what}")

        timed = interleave(subjects, self._request.repeats, self._machine, on_turn)
        for (name, what), error in timed.errors.items():
            self._stop(name, what, error)
        for (name, what), seconds in timed.seconds.items():
            if (name, what) not in timed.errors:
                self._methods[name] = self._with_times(self._methods[name], what, Spread.of(seconds))

    def _subjects(self, name: str) -> Iterator[tuple[str, Subject]]:
        """The kinds of turns of a method; on the CPU with the memory that they need."""
        request, method = self._request, self._methods[name]
        builders = Builders.of(request, method.trainer)
        shape = (self._setting.input_channels, *request.timed_patch)
        batch = self._setting.batch_size
        kinds = [
            (STEP, builders.train, training, batch, step_needs),
            (COMPILED, builders.compiled, training, batch, step_needs),
            (PATCH, builders.deploy, inference, 1, inference_needs),
        ]
        for what, build, prepare, samples, needs in kinds:
            if not (request.times_compiled if what == COMPILED else method.budget is None):
                continue
            try:
                needed = 0 if self._machine.is_cuda else needs(request, builders)
            except Exception as error:
                self._stop(name, what, error)
            else:
                yield what, Subject(build, prepare, (samples, *shape), needed)

    def _with_times(self, method: Method, what: str, spread: Spread) -> Method:
        if what == STEP:
            return replace(method, step_seconds=spread)
        if what == COMPILED:
            return replace(method, compiled_step_seconds=spread)
        tiles, setting = tiles_per_case(self._setting), self._setting
        if tiles is None or self._request.timed_patch != setting.patch_size:
            return replace(method, patch_seconds=spread)
        case = tiles * spread.median
        mirrored = case * passes_mirrored(setting)
        return replace(method, patch_seconds=spread, case_seconds=case, case_seconds_mirrored=mirrored)

    def _depth(self, name: str) -> Iterator[DepthPoint]:
        """Points of the curve of a network whose depth can be set."""
        setting = self._setting
        key = depth_key(setting, name) if self._request.depths else None
        for depth in self._request.depths:
            self._next(f"{name}: depth {depth}")
            if key is None:
                continue
            try:
                yield count_depth(setting, name, depth, key)
            except Exception as error:
                self._stop(name, f"depth {depth}", error)
