"""Bytes of the tensors that live and the most that ever lived, followed by their storages.

Under PyTorch's `FakeTensorMode` every operation runs on shapes only, so that a step of full size is followed without a
GPU and without allocating. Convolution workspaces, the allocator's rounding and the CUDA context are no tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is entered and still alive.

    Attributes:
        current: Bytes alive now.
        peak: Largest value of `current` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count the storages of its results."""
        result = func(*args, **(kwargs or {}))
        known = {id_ for leaf in tree_leaves((args, kwargs)) if (id_ := _storage_id(leaf)) is not None}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage_id(leaf) not in known:
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()

        def forget(_: Any) -> None:
            self.current -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, forget)
        self.current += size
        self.peak = max(self.peak, self.current)


def _storage_id(leaf: Any) -> int | None:
    return leaf.untyped_storage()._cdata if isinstance(leaf, Tensor) else None
