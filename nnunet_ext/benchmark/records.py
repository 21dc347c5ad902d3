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


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Seconds of several repeats."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Summarise at least one measurement."""
        return cls(median=median(seconds), min=min(seconds), max=max(seconds))


@dataclass(frozen=True, kw_only=True)
class Method:
    """Figures of one trainer's network; None where there is none.

    Args:
        trainer: Name of the trainer.
        network: Class of the network; None where it can't be built.
        status: Whether everything that was asked for was measured.
        reason: Why not; empty where `status` is "ok".
        parameters: Number of weights in training.
        parameters_deployed: Number of weights in the form that predicts.
        macs: Multiply-accumulate operations of the deployed form for one patch.
        memory: "counted" on shapes, or "measured" on the GPU; the latter holds parameters and momentum too.
        held_bytes: Alive after the forward pass of a training step.
        peak_bytes: Largest number of bytes alive in a training step.
        reserved_bytes: Taken from the GPU by PyTorch's allocator in a training step.
        inference_peak_bytes: Largest number of bytes alive in the forward pass of one patch.
        step_seconds: Seconds of a training step, not compiled.
        compiled_step_seconds: Seconds of a training step compiled as nnU-Net compiles it.
        patch_seconds: Seconds of the forward pass of one patch.
        case_seconds: Computed for a case of median size, without mirroring.
        case_seconds_mirrored: The same, mirrored along all axes.
        ratios: Name in `QUANTITIES` -> ratio to the baseline.
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
            key: _ratio(self, baseline, key) if comparable or not key.endswith("_bytes") else None for key in QUANTITIES
        }
        return replace(self, ratios=ratios)


def _ratio(method: Method, baseline: Method, key: str) -> float | None:
    ours, theirs = (getattr(record, key) for record in (method, baseline))
    if isinstance(ours, Spread) and isinstance(theirs, Spread):
        ours, theirs = ours.median, theirs.median
    return ours / theirs if ours is not None and theirs else None


@dataclass(frozen=True, kw_only=True)
class DepthPoint:
    """Memory of a training step of a network of some depth, counted on shapes.

    Args:
        trainer: Name of the trainer.
        network: Class of the network.
        depth: Reversible blocks per stage, or pairs of convolutions per stage of default nnU-Net.
        parameters: Number of weights.
        held_bytes, peak_bytes: Figures of `Method`.
    """

    trainer: str
    network: str
    depth: int
    parameters: int
    held_bytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """Result of a benchmark; the first method is the baseline.

    Args:
        device: Name of the GPU, or the CPU and its threads.
        torch, nnunetv2: Versions.
        precision: "float32" or "mixed".
        plans, configuration: Names.
        patch_size: Voxels per axis that memory and operations are of.
        batch_size: Patches per training step.
        input_channels, num_classes: Channels of the network's input and output.
        time_patch_size: Voxels per axis that times are of.
        repeats: Rounds that were timed.
        tiles_per_case: Patches of a case of median size; None where it is not known.
        passes_mirrored: Forward passes per patch with mirroring.
        methods: One record per trainer, in the order asked for.
        depth: Empty where it was not asked for.
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
