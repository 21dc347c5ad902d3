"""Expected memory of a training and the GPUs that have it, as `nnunet-ext estimate` prints it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nnunet_ext.errors import UsageError
from nnunet_ext.memory.count import FRAGMENTED_SHARE, TrainingMemory, training_memory
from nnunet_ext.memory.gpu import GpuStepMemory, measure_gpu_step
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.printable import one_line
from nnunet_ext.protocols import only_predicts

COMMON_SIZES = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141)  # GB of GPUs


@dataclass(frozen=True)
class Estimate:
    """What a training is expected to need.

    Args:
        setting: Plans, data set and configuration.
        trainer: Name.
        memory: Bytes.
        gpu: Name and bytes of this machine's GPU, if there is one.
        measured: What a real step took of it, if that was asked for.
    """

    setting: Setting
    trainer: str
    memory: TrainingMemory
    gpu: tuple[str, int] | None = None
    measured: GpuStepMemory | None = None

    @property
    def enough(self) -> int | None:
        """Smallest common size of a GPU in GB that has it; None where none has."""
        return next((size for size in COMMON_SIZES if size * GIB >= self.memory.expected), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: sizes in bytes."""
        return {
            "plans": str(self.setting.plans.get("plans_name", "")),
            "configuration": self.setting.configuration,
            "trainer": self.trainer,
            "patch_size": list(self.setting.patch_size),
            "batch_size": self.setting.batch_size,
            "bytes": self.memory.as_dict(),
            "smallest_common_gpu_GB": self.enough,
            "gpu": None if self.gpu is None else {"name": self.gpu[0], "bytes": self.gpu[1]},
            "fits_gpu": None if self.gpu is None else self.memory.expected <= self.gpu[1],
            "measured_held_bytes": self.measured and self.measured.held,
            "measured_peak_bytes": self.measured and self.measured.peak,
            "measured_reserved_bytes": self.measured and self.measured.reserved,
            "measured_outside_bytes": self.measured and self.measured.outside,
        }

    def lines(self) -> Iterator[str]:
        """For people: GB of 2**30 bytes."""
        setting, memory = self.setting, self.memory
        patch = "x".join(map(str, setting.patch_size))
        yield (
            f"{self.trainer}, {setting.plans.get('plans_name', '')}, {setting.configuration}: patch {patch}, batch "
            f"{setting.batch_size}, float16 autocast"
        )
        parts = {
            "parameters": memory.parameters,
            "gradients": memory.gradients,
            "optimiser": memory.optimizer,
            "held": memory.held,
            "peak": memory.peak,
            "allowance for CUDA": memory.allowance,
            "expected": memory.expected,
        }
        for name, size in parts.items():
            yield f"  {name:<20}{size / GIB:8.2f} GB"
        share = f"{FRAGMENTED_SHARE:.0%}"
        yield (
            "Held: alive after the forward pass, beside weights and optimiser; peak: the most at any time; expected: "
            f"peak + allowance, which is assumed: context, workspaces, {share} of the peak. 1 GB is 2**30 bytes."
        )
        yield self._verdict()
        if self.measured is not None:
            yield from _beside(self.measured, memory)

    def _verdict(self) -> str:
        expected = self.memory.expected
        if self.gpu is None:
            sizes = [f"{size}" for size in COMMON_SIZES if size * GIB >= expected]
            found = ", ".join(sizes[:4])
            return f"No GPU here. Enough: GPUs of {found} GB and more." if sizes else "No common GPU has that much."
        name, size = self.gpu
        if expected <= size:
            return f"This GPU has it: {name}, {size / GIB:.1f} GB."
        return f"This GPU does not have it: {name}, {size / GIB:.1f} GB; choose a smaller batch or patch."


def estimate(setting: Setting, trainer: str, measure: bool = False) -> Estimate:
    """Count the memory of a training, and with `measure` run a real step on this machine's GPU.

    Raises:
        UsageError: the trainer is unknown, does not train or can't run with these plans; no GPU to measure on.
    """
    if only_predicts(trainer_class(trainer)):
        raise UsageError(f"{trainer} only predicts, so no training can be estimated: name the trainer it came from.")
    if measure and not torch.cuda.is_available():
        raise UsageError("--measure needs an NVIDIA GPU, PyTorch finds none: leave it out.")
    try:
        memory = training_memory(setting, trainer)
    except UsageError:
        raise
    except Exception as error:  # of any trainer's and network's code
        raise UsageError(
            f"{trainer} can't run a training step of {setting.configuration}: {one_line(error)} Choose other "
            "plans (-p) or another trainer."
        ) from error
    gpu = None
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        gpu = found.name, int(found.total_memory)
    return Estimate(setting, trainer, memory, gpu, measure_gpu_step(setting, trainer) if measure else None)


def _beside(measured: GpuStepMemory, memory: TrainingMemory) -> Iterator[str]:
    """What was measured next to what was counted, each with what it can be compared with."""
    rows = (
        ("held", measured.held, "held", memory.held),
        ("peak, with workspaces", measured.peak, "peak + workspaces", memory.peak + memory.workspace),
        ("reserved and outside", measured.reserved + measured.outside, "expected", memory.expected),
    )
    for what, found, name, counted in rows:
        yield (
            f"Measured {what}: {found / GIB:.2f} GB; {name} as counted: {counted / GIB:.2f} GB "
            f"({counted / found - 1:+.1%})."
        )
    yield (
        f"Reserved by PyTorch: {measured.reserved / GIB:.2f} GB. Outside of it (context, libraries, other programs): "
        f"{measured.outside / GIB:.2f} GB."
    )
