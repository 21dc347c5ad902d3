"""All processes of a training end with it, however it ends."""

from __future__ import annotations

import os
import threading
import time
from multiprocessing import connection, parent_process, util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunet_ext.protocols import HostTrainer
else:
    HostTrainer = object

_GRACE = 10.0  # seconds for a rank to end by itself, which PyTorch interrupts where its parent is gone
_watching: set[int] = set()  # this process, once it does; forked processes have its parents here too


class EndsTogetherMixin(HostTrainer):
    """Ends what a training has started when it is ended by a signal; stands before ``nnUNetTrainer``.

    SIGTERM and SIGKILL end a process at once, before it can tell its children. nnU-Net's augmentation processes then
    go on for ever, and hold memory and what they have inherited; ranks of a training on several GPUs may wait for each
    other. So each of them waits for the end of its parent. Signals keep the handlers and the effect they have: none is
    set here, which a job's own would have to be told from and processes that are forked would inherit.

    Processes that are forked are seen to: nnU-Net's on Linux up to Python 3.13.
    """

    def run_training(self) -> None:
        """Train as nnU-Net does."""
        util.register_after_fork(self, _end_forked)  # forgotten with this trainer
        if self.is_ddp and parent_process() is not None:
            _watch(_GRACE)
        super().run_training()


def _end_forked(trainer: Any) -> None:
    """In a new process of `multiprocessing`: end with its parent."""
    _watch(0.0)


def _watch(grace: float) -> None:
    if os.getpid() not in _watching:
        _watching.add(os.getpid())
        threading.Thread(target=_end_with_parent, args=(grace,), name="end with parent", daemon=True).start()


def _end_with_parent(grace: float) -> None:
    """Wait for the end of the parent, then end this process, whatever else it waits for."""
    parent = parent_process()
    if parent is None:
        return
    connection.wait([parent.sentinel])
    time.sleep(grace)
    os._exit(1)
