"""What a training has started ends with it: forked processes at once, a rank after a while to end by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_ext.trainers import ending

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nnU-Net forks on Linux")

# A training whose loaders never end by themselves; it says who they are.
TRAINING = """
import multiprocessing, os, signal, sys, time
from nnunet_ext.trainers.ending import EndsTogetherMixin

def load():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whatever they make of signals
    while True:
        time.sleep(0.1)

class Host:
    is_ddp = {is_ddp}
    def run_training(self):
        context = multiprocessing.get_context("fork")
        loaders = [context.Process(target=load, daemon=True) for _ in range(3)]
        for loader in loaders:
            loader.start()
        print(os.getpid(), *(loader.pid for loader in loaders), flush=True)
        while True:
            time.sleep(0.1)

class Trainer({mixin}Host):
    pass

def train():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a job in the background
    Trainer().run_training()

if __name__ == "__main__":
    {main}
"""
ALONE = "Trainer().run_training()"
RANK = """
    from nnunet_ext.trainers import ending
    ending._GRACE = 0.2
    rank = multiprocessing.get_context("fork").Process(target=train)
    rank.start()
    rank.join()
"""


def living(processes: list[int]) -> list[int]:
    """Those of the processes that have not ended."""

    def state(process: int) -> str:
        try:
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "X"

    return [process for process in processes if state(process) not in "ZX"]


def ended(processes: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while living(processes) and time.monotonic() < end:
        time.sleep(0.05)
    return not living(processes)


def _heed() -> None:
    """Heed what a suite in the background, as under `nohup`, ignores."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
@pytest.mark.parametrize("main", [ALONE, RANK])
def test_no_process_outlives_a_training_that_a_signal_ends(number: signal.Signals, main: str) -> None:
    code = TRAINING.format(mixin="EndsTogetherMixin, ", main=main, is_ddp=main == RANK)
    training = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_heed
    )
    assert training.stdout is not None
    processes = [int(word) for word in training.stdout.readline().split()]
    try:
        assert len(living(processes)) == 4
        training.send_signal(number)
        assert training.wait() == -number  # the effect that the signal has without us
        assert ended(processes, 60)
    finally:
        for process in living(processes):
            os.kill(process, signal.SIGKILL)
        training.stdout.close()


def test_watching_sets_no_handler_and_needs_no_parent() -> None:
    class Host:
        is_ddp = True

        def run_training(self) -> None:
            self.handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    class Trainer(ending.EndsTogetherMixin, Host):
        pass

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    trainer = Trainer()
    trainer.run_training()
    assert trainer.handlers == before
    assert os.getpid() not in ending._watching  # nobody has started this process by multiprocessing
