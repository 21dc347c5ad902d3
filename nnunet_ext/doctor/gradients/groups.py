"""Groups of one sample, for networks so small that all samples are one group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nnunet_ext.architectures.checkpointed import levels
from nnunet_ext.architectures.expanded import partial_pass
from nnunet_ext.architectures.reversible import stages

HOLDERS = (stages, levels, partial_pass)  # of the constant; a test finds those that are missing
CONSTANT = "GROUP_ELEMENTS"


@contextmanager
def groups_of_one() -> Iterator[None]:
    """Build and run what goes through a batch in groups with one sample in each, four groups at most."""
    before = [vars(holder)[CONSTANT] for holder in HOLDERS]
    for holder in HOLDERS:
        setattr(holder, CONSTANT, 1)
    try:
        yield
    finally:
        for holder, elements in zip(HOLDERS, before, strict=True):
            setattr(holder, CONSTANT, elements)
