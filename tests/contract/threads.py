"""nnU-Net's pools as threads: each of their processes would import PyTorch again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import dummy, get_context
from typing import Any
from unittest.mock import patch


@contextmanager
def threads_for_processes() -> Iterator[None]:
    """nnU-Net's pools are of threads in here."""

    class Threads:
        Pool = staticmethod(dummy.Pool)

        def __getattr__(self, name: str) -> Any:
            return getattr(get_context("spawn"), name)

    with (
        patch("multiprocessing.get_context", lambda _=None: Threads()),
        patch("nnunetv2.utilities.utils.Pool", lambda processes: dummy.Pool(1)),
    ):
        yield
