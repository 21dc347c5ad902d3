"""What a benchmark reports: frozen records, and their ratios to the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

DEFAULT_NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet")
Status = Literal["ok", "out of memory", "failed"]

# Fields of `Method` that ratios to the baseline are given of.
QUANTITIES = (
    "parameters",
    "parameters_deployed",
    "macs",
    "held_bytes",
    "peak_bytes",
    "expected_bytes",
    "float32_held_bytes",
    "float32_peak_bytes",
    "inference_peak_bytes",
    "measured_held_bytes",
    "measured_peak_bytes",
    "measured_reserved_bytes",
    "compiled_held_bytes",
    "compiled_peak_bytes",
    "measured_inference_peak_bytes",
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
    """Figures of one trainer's network; None where there is none. Memory is in bytes.

    Args:
        trainer: Name of the trainer.
        budget: Share of what it would keep that the compiled network may keep, for a row of its own; None: no budget.
        network: Class of the network; None where it can't be built.
        status: Whether everything that was asked for was found.
        reason: Why not; empty where `status` is "ok".
        parameters: Number of weights in training.
        parameters_deployed: Number of weights in the form that predicts.
        macs: Multiply-accumulate operations of the deployed form for one patch.
        held_bytes, peak_bytes, expected_bytes: Counted in float16 autocast, see `memory.count`.
        float32_held_bytes, float32_peak_bytes: The same in float32.
        inference_peak_bytes: The most at any time of the forward pass of one patch, weights included; counted in
            float16 autocast.
        measured_held_bytes, measured_peak_bytes, measured_reserved_bytes: Of a step on the GPU, see `memory.gpu`.
        compiled_held_bytes, compiled_peak_bytes: The same of the compiled step.
        measured_inference_peak_bytes: Of the forward pass of one patch on the GPU.
        step_seconds: Seconds of a training step, not compiled.
        compiled_step_seconds: Seconds of a training step compiled as nnU-Net compiles it.
        patch_seconds: Seconds of the forward pass of one patch.
        case_seconds: Computed for a case of median size, without mirroring.
        case_seconds_mirrored: The same, mirrored along all axes.
        ratios: Name in `QUANTITIES` -> ratio to the baseline.
    """

    trainer: str
    budget: float | None = None
    network: str | None = None
    status: Status = "ok"
    reason: str = ""
    parameters: int | None = None
    parameters_deployed: int | None = None
    macs: int | None = None
    held_bytes: int | None = None
    peak_bytes: int | None = None
    expected_bytes: int | None = None
    float32_held_bytes: int | None = None
    float32_peak_bytes: int | None = None
    inference_peak_bytes: int | None = None
    measured_held_bytes: int | None = None
    measured_peak_bytes: int | None = None
    measured_reserved_bytes: int | None = None
    compiled_held_bytes: int | None = None
    compiled_peak_bytes: int | None = None
    measured_inference_peak_bytes: int | None = None
    step_seconds: Spread | None = None
    compiled_step_seconds: Spread | None = None
    patch_seconds: Spread | None = None
    case_seconds: float | None = None
    case_seconds_mirrored: float | None = None
    ratios: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name of the row."""
        return self.trainer if self.budget is None else f"{self.trainer} (compiled, budget {self.budget:g})"

    def stopped(self, status: Status, reason: str) -> Method:
        """The same with this status; the first reason stays."""
        return self if self.reason else replace(self, status=status, reason=reason)

    def compared(self, baseline: Method) -> Method:
        """The same with ratios to `baseline`."""
        return replace(self, ratios={key: _ratio(self, baseline, key) for key in QUANTITIES})


def _ratio(method: Method, baseline: Method, key: str) -> float | None:
    ours, theirs = (getattr(record, key) for record in (method, baseline))
    if isinstance(ours, Spread) and isinstance(theirs, Spread):
        ours, theirs = ours.median, theirs.median
    return ours / theirs if ours is not None and theirs else None


@dataclass(frozen=True, kw_only=True)
class DepthPoint:
    """Memory of a training step of a network of some depth, counted in float16 autocast.

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
        precision: "float32" or "mixed": of the times, and of the memory that is measured.
        plans, configuration: Names.
        patch_size: Voxels per axis that memory and operations are of.
        batch_size: Patches per training step.
        input_channels, num_classes: Channels of the network's input and output.
        time_patch_size: Voxels per axis that times are of.
        repeats: Rounds that were timed.
        tiles_per_case: Patches of a case of median size; None where it is not known.
        passes_mirrored: Forward passes per patch with mirroring.
        methods: One record per trainer, in the order asked for, then the baseline compiled with memory budgets.
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

    @property
    def baseline(self) -> str:
        """What ratios are to."""
        default = self.methods[0].network in (None, *DEFAULT_NETWORKS)
        return "default nnU-Net" if default else f"{self.methods[0].trainer} with these plans"
