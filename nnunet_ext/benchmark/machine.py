"""The device that networks run on: precision, room, and what one network leaves behind for the next."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch

from nnunet_ext.errors import UsageError
from nnunet_ext.memory.tracker import GIB

Precision = Literal["float32", "mixed"]
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class DoesNotFitError(RuntimeError):
    """A network needs more memory than there is; found before trying, as Linux would kill the process."""


@dataclass(frozen=True)
class Machine:
    """A device and the precision that networks run in.

    Args:
        kind: "cuda" or "cpu".
        precision: "mixed" is autocast, float16 on CUDA as nnU-Net trains, bfloat16 on the CPU.
    """

    kind: str
    precision: Precision

    @classmethod
    def find(cls, kind: str | None, precision: Precision | None) -> Machine:
        """Choose CUDA where there is one and mixed precision there, unless asked for something else.

        Raises:
            UsageError: CUDA is asked for and PyTorch finds none.
        """
        available = torch.cuda.is_available()
        if kind == "cuda" and not available:
            raise UsageError(
                f"--device cuda needs an NVIDIA GPU, PyTorch {torch.__version__} finds none: "
                "install a CUDA build of PyTorch and a driver, or use --device cpu."
            )
        kind = kind or ("cuda" if available else "cpu")
        return cls(kind, precision or ("mixed" if kind == "cuda" else "float32"))

    @property
    def is_cuda(self) -> bool:
        """Whether memory is measured too."""
        return self.kind == "cuda"

    @property
    def name(self) -> str:
        """Name of the GPU, or the number of threads on the CPU."""
        if self.is_cuda:
            return str(torch.cuda.get_device_name())
        return f"CPU, threads: {torch.get_num_threads()}"

    @property
    def counting_dtype(self) -> torch.dtype | None:
        """Autocast of the CPU that stands for this precision where it is counted whether a timed step fits."""
        return torch.bfloat16 if self.precision == "mixed" else None

    def autocast(self) -> Any:
        """Context that the forward pass and the loss run in."""
        return torch.autocast(self.kind, enabled=self.precision == "mixed")

    def gradient_scaler(self) -> torch.amp.GradScaler:
        """The scaler that nnU-Net trains with in float16; elsewhere one that does nothing."""
        return torch.amp.GradScaler(self.kind, enabled=self.is_cuda and self.precision == "mixed")

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Let cuDNN choose the fastest algorithm, as nnU-Net's commands do."""
        with torch.backends.cudnn.flags(enabled=True, benchmark=self.is_cuda):
            yield

    def synchronize(self) -> None:
        """Wait until everything that was started is done."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give back to the GPU what no tensor uses; on the CPU that happens by itself."""
        if self.is_cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def room(self) -> int:
        """Bytes that can be allocated now."""
        return int(torch.cuda.mem_get_info()[0] if self.is_cuda else psutil.virtual_memory().available)

    def require(self, needed: int) -> None:
        """Refuse on the CPU what can't be caught there; on CUDA the allocator says so itself.

        Args:
            needed: Bytes in addition to what is allocated now.

        Raises:
            DoesNotFitError: there is less room.
        """
        if not self.is_cuda and needed > (room := self.room()):
            raise DoesNotFitError(f"does not fit in {gigabytes(room)}: needs {gigabytes(needed)}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of PyTorch or a library of CUDA found no memory."""
    if isinstance(error, (DoesNotFitError, MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def gigabytes(size: float) -> str:
    """Bytes as text; 1 GB is 2**30 bytes."""
    return f"{size / GIB:.1f} GB"
