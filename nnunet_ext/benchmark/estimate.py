"""Expected memory of a training and the GPUs that have it, as `nnunet-ext estimate` prints it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nnunet_ext.benchmark.counting import one_line
from nnunet_ext.benchmark.memory import GIB
from nnunet_ext.benchmark.setting import Setting
from nnunet_ext.benchmark.training_memory import FRAGMENTED_SHARE, TrainingMemory, training_memory
from nnunet_ext.errors import UsageError
from nnunet_ext.lookup import trainer_class

COMMON_SIZES = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141)  # GB of GPUs


@dataclass(frozen=True)
class Estimate:
    """What a training is expected to need.

    Args:
        setting: plans, data set and configuration.
        trainer: name.
        memory: bytes.
        gpu: name and bytes of this machine's GPU, if there is one.
        measured: bytes that a real step allocated on it at most, if that was asked for.
    """

    setting: Setting
    trainer: str
    memory: TrainingMemory
    gpu: tuple[str, int] | None = None
    measured: int | None = None

    @property
    def enough(self) -> int | None:
        """Smallest common size of a GPU in GB that has it; None where none has."""
        return next((size for size in COMMON_SIZES if size * GIB >= self.memory.total), None)

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
            "fits_gpu": None if self.gpu is None else self.memory.total <= self.gpu[1],
            "measured_peak_bytes": self.measured,
        }

    def lines(self) -> Iterator[str]:
        """For people: GB of 2**30 bytes."""
        setting, memory = self.setting, self.memory
        patch = "x".join(map(str, setting.patch_size))
        yield (
            f"{self.trainer}, {setting.plans.get('plans_name', '')}, {setting.configuration}: patch {patch}, batch "
            f"{setting.batch_size}, mixed precision"
        )
        parts = {
            "parameters": memory.parameters,
            "gradients": memory.gradients,
            "optimiser": memory.optimizer,
            "activations held": memory.activations,
            "peak of the step": memory.peak,
            "allowance for CUDA": memory.allowance,
            "expected": memory.total,
        }
        for name, size in parts.items():
            yield f"  {name:<20}{size / GIB:8.2f} GB"
        share = f"{FRAGMENTED_SHARE:.0%}"
        yield f"1 GB is 2**30 bytes. The allowance is assumed: context, workspaces, {share} of the peak."
        yield self._verdict()
        if self.measured is not None:
            difference = memory.peak / self.measured - 1
            measured = f"{self.measured / GIB:.2f} GB"
            yield f"Measured peak of a real step: {measured}; the counted one differs by {difference:+.1%}."

    def _verdict(self) -> str:
        total = self.memory.total
        if self.gpu is None:
            sizes = [f"{size}" for size in COMMON_SIZES if size * GIB >= total]
            found = ", ".join(sizes[:4])
            return (
                f"No GPU here. Enough: GPUs of {found} GB and more."
                if sizes
                else "No common GPU has that much."
            )
        name, size = self.gpu
        if total <= size:
            return f"This GPU has it: {name}, {size / GIB:.1f} GB."
        return f"This GPU does not have it: {name}, {size / GIB:.1f} GB; choose a smaller batch or patch."


def estimate(setting: Setting, trainer: str, measure: bool = False) -> Estimate:
    """Count the memory of a training, and with `measure` run a real step on this machine's GPU.

    Raises:
        UsageError: the trainer is unknown, does not train or can't run with these plans; no GPU to measure on.
    """
    if getattr(trainer_class(trainer), "predicts_only", False):
        raise UsageError(
            f"{trainer} only predicts, so no training can be estimated: name the trainer it came from."
        )
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
    return Estimate(setting, trainer, memory, gpu, _measured(setting, trainer) if measure else None)


def _measured(setting: Setting, trainer: str) -> int:
    """Bytes that the second of two real steps allocates at most; the first lets cuDNN try its algorithms."""
    from nnunet_ext.benchmark.trainer_step import TrainerStep

    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        step = TrainerStep(setting, trainer, "cuda")
        step.make_state()
        for _ in range(2):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            for _ in step.passes():
                pass
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())
