"""What a benchmark is asked for, checked before anything runs."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

from nnunet_ext import registry
from nnunet_ext.benchmark.machine import Machine
from nnunet_ext.errors import UsageError
from nnunet_ext.memory.compiled import DEFAULT_BUDGET
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.printable import counted
from nnunet_ext.protocols import only_predicts

BASELINE = registry.CORE_TRAINER


@dataclass(frozen=True)
class BenchmarkRequest:
    """What is measured.

    Args:
        setting: Plans, data set and configuration.
        machine: Device and precision.
        trainers: Names in addition to the baseline; None: all that are registered and usable.
        repeats: Timed rounds; 0: no times.
        time_patch: Voxels per axis for the times; None: the plans' patch.
        depths: Blocks per stage for the curve of memory against depth; empty: no curve.
        compiled: Whether training steps run compiled too; None: on CUDA, where nnU-Net compiles.
        budgets: Memory budgets of rows of the compiled baseline; None: one, where all registered trainers take part.

    Raises:
        UsageError: a value that can't be.
    """

    setting: Setting
    machine: Machine
    trainers: tuple[str, ...] | None = None
    repeats: int = 5
    _: KW_ONLY
    time_patch: tuple[int, ...] | None = None
    depths: tuple[int, ...] = ()
    compiled: bool | None = None
    budgets: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.repeats < 0:
            raise UsageError(f"--repeats must be 0 or more, got {self.repeats}: 0 takes no times.")
        if any(depth < 1 for depth in self.depths):
            raise UsageError(f"--depth needs numbers of 1 or more, got {min(self.depths)}: use for example 1 2 4 8.")
        if any(not 0 < share < 1 for share in self.budgets or ()):
            wrong = next(share for share in self.budgets or () if not 0 < share < 1)
            raise UsageError(f"--budget needs shares between 0 and 1, got {wrong:g}: use for example 0.5.")
        for trainer in self.trainers or ():
            trainer_class(trainer)
        if self.time_patch is not None:
            self._check_time_patch(self.time_patch)

    def _check_time_patch(self, patch: tuple[int, ...]) -> None:
        strides = self.setting.strides
        shown = " ".join(map(str, patch))
        if len(patch) != len(strides):
            raise UsageError(f"--time-patch needs {counted(len(strides), 'number')}, got {shown}: give one per axis.")
        coarsest = [voxels / stride for voxels, stride in zip(patch, strides, strict=True)]
        if not all(size.is_integer() and size > 0 for size in coarsest) or math.prod(coarsest) < 2:
            raise UsageError(
                f"--time-patch must be divisible by {' '.join(map(str, strides))} and leave more than one voxel at "
                f"the coarsest stage, got {shown}: use multiples of these numbers."
            )

    @property
    def compiles(self) -> bool:
        """Whether training steps run compiled too."""
        return self.machine.is_cuda if self.compiled is None else self.compiled

    @property
    def times_compiled(self) -> bool:
        """Whether training steps are timed compiled too."""
        return bool(self.repeats) and self.compiles

    @property
    def timed_patch(self) -> tuple[int, ...]:
        """Voxels per axis that times are of."""
        return self.time_patch or self.setting.patch_size

    @property
    def shares(self) -> tuple[float, ...]:
        """Memory budgets of rows of the compiled baseline."""
        if self.budgets is None:
            return (DEFAULT_BUDGET,) if self.trainers is None else ()
        return tuple(dict.fromkeys(self.budgets))

    @property
    def names(self) -> tuple[str, ...]:
        """The baseline, then the others, each once."""
        trained = (name for name in registry.names("trainers") if not _only_predicts(name))
        others = trained if self.trainers is None else self.trainers
        return tuple(dict.fromkeys([BASELINE, *others]))


def _only_predicts(name: str) -> bool:
    """Whether a registered trainer has no network of its own to measure; one that can't be loaded becomes a row."""
    try:
        return only_predicts(trainer_class(name))
    except UsageError:
        return False
