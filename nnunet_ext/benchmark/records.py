"""What a benchmark reports: frozen records, and their ratios to the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

Status = Literal["ok", "out of memory", "failed"]

# Fields of `Method` that ratios to the baseline are given of.
QUANTITIES = (
    "parameters",
    "parameters_deployed",
    "macs",
    "held_bytes",
    "peak_bytes",
    "reserved_bytes",
    "inference_peak_bytes",
    "step_seconds",
    "compiled_step_seconds",
    "patch_seconds",
)


@dataclass(frozen=True)
class Spread:
    """Seconds of several repeats."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Summarise at least one measurement."""
        return cls(median(seconds), min(seconds), max(seconds))


@dataclass(frozen=True)
class Method:
    """Figures of one trainer's network; None where there is none.

    Args:
        trainer: name of the trainer.
        network: class of the network; None where it can't be built.
        status: whether everything that was asked for was measured.
        reason: why not; empty where `status` is "ok".
        parameters: number of weights in training.
        parameters_deployed: number of weights in the form that predicts.
        macs: multiply-accumulate operations of the deployed form for one patch.
        memory: "counted" on shapes, or "measured" on the GPU; the latter holds parameters and momentum too.
        held_bytes: alive after the forward pass of a training step.
        peak_bytes: largest number of bytes alive in a training step.
        reserved_bytes: taken from the GPU by PyTorch's allocator in a training step.
        inference_peak_bytes: largest number of bytes alive in the forward pass of one patch.
        step_seconds: of a training step, not compiled.
        compiled_step_seconds: of a training step compiled as nnU-Net compiles it.
        patch_seconds: of the forward pass of one patch.
        case_seconds: computed for a case of median size, without mirroring.
        case_seconds_mirrored: the same, mirrored along all axes.
        ratios: name in `QUANTITIES` -> ratio to the baseline.
    """

    trainer: str
    network: str | None = None
    status: Status = "ok"
    reason: str = ""
    parameters: int | None = None
    parameters_deployed: int | None = None
    macs: int | None = None
    memory: Literal["counted", "measured"] = "counted"
    held_bytes: int | None = None
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    inference_peak_bytes: int | None = None
    step_seconds: Spread | None = None
    compiled_step_seconds: Spread | None = None
    patch_seconds: Spread | None = None
    case_seconds: float | None = None
    case_seconds_mirrored: float | None = None
    ratios: Mapping[str, float | None] = field(default_factory=dict)

    def stopped(self, status: Status, reason: str) -> Method:
        """The same with this status; the first reason stays."""
        return self if self.reason else replace(self, status=status, reason=reason)

    def compared(self, baseline: Method) -> Method:
        """The same with ratios to `baseline`; memory is compared only where both were found in the same way."""
        comparable = self.memory == baseline.memory
        ratios = {
            key: _ratio(self, baseline, key) if comparable or not key.endswith("_bytes") else None
            for key in QUANTITIES
        }
        return replace(self, ratios=ratios)


def _ratio(method: Method, baseline: Method, key: str) -> float | None:
    ours, theirs = (getattr(record, key) for record in (method, baseline))
    if isinstance(ours, Spread) and isinstance(theirs, Spread):
        ours, theirs = ours.median, theirs.median
    return ours / theirs if ours is not None and theirs else None


@dataclass(frozen=True)
class DepthPoint:
    """Memory of a training step of a network of some depth, counted on shapes.

    Args:
        trainer: name of the trainer.
        network: class of the network.
        depth: reversible blocks per stage, or pairs of convolutions per stage of default nnU-Net.
        parameters: number of weights.
        held_bytes, peak_bytes: as in `Method`.
    """

    trainer: str
    network: str
    depth: int
    parameters: int
    held_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Report:
    """Result of a benchmark; the first method is the baseline.

    Args:
        device: name of the GPU, or the CPU and its threads.
        torch, nnunetv2: versions.
        precision: "float32" or "mixed".
        plans, configuration: names.
        patch_size: voxels per axis that memory and operations are of.
        batch_size: patches per training step.
        input_channels, num_classes: of the network.
        time_patch_size: voxels per axis that times are of.
        repeats: rounds that were timed.
        tiles_per_case: patches of a case of median size; None where it is not known.
        passes_mirrored: forward passes per patch with mirroring.
        methods: in the order asked for.
        depth: empty where it was not asked for.
    """

    device: str
    torch: str
    nnunetv2: str
    precision: str
    plans: str
    configuration: str
    patch_size: tuple[int, ...]
    batch_size: int
    input_channels: int
    num_classes: int
    time_patch_size: tuple[int, ...]
    repeats: int
    tiles_per_case: int | None
    passes_mirrored: int
    methods: tuple[Method, ...]
    depth: tuple[DepthPoint, ...]
