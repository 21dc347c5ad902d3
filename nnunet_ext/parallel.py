"""One function on many inputs, in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from nnunet_ext.errors import UsageError

Input = TypeVar("Input")
Result = TypeVar("Result")


def mapped(function: Callable[[Input], Result], inputs: Sequence[Input], processes: int) -> Iterator[Result]:
    """Results in the order of the inputs; with one process, or one input, in this process.

    Raises:
        UsageError: a process was killed, mostly because memory ran out.
    """
    processes = min(processes, len(inputs))
    if processes < 2:
        yield from map(function, inputs)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(function, inputs)
        except BrokenProcessPool as error:
            raise UsageError(
                f"one of {processes} processes was killed, probably for its memory: use fewer processes."
            ) from error
