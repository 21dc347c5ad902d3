"""Trains default nnU-Net, its rivals and every registered trainer on one data set, under one schedule.

python benchmarks/learning.py -d 4 --schedule 8epochs_125iters [--trainers TRAINER[:PLANS] ...] [--folds 0] [--jobs 1]

Needs a planned and preprocessed data set. nnU-Net's own training and validation, each in a process of its own that
begins with one seed, written into nnUNet_results for `nnunet-ext compare`. What is validated already is left out and
what has a checkpoint goes on, so that the same command continues where it was stopped. On the CPU `--precision
bfloat16` enters the CPU's autocast where nnU-Net enters CUDA's, in training and prediction.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from unittest.mock import patch

from nnunet_ext import aims
from nnunet_ext.files import write_text
from nnunet_ext.nnunet.datasets import find_dataset

PRECISIONS = ("float32", "bfloat16")
PLACES = ("nnunetv2.training.nnUNetTrainer.nnUNetTrainer", "nnunetv2.inference.predict_from_raw_data")
NEEDS_MORE = ("Cascade", "Distilled")  # plans of two stages, a teacher


@dataclass(frozen=True, kw_only=True)
class Training:
    """A trainer with its schedule, its plans, and a fold."""

    dataset: str
    configuration: str
    trainer: str
    plans: str
    fold: str
    device: str
    precision: str
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its log."""
        return "__".join((self.dataset, self.trainer, self.plans, self.configuration, self.fold))

    @property
    def folder(self) -> Path:
        """Where nnU-Net writes it."""
        results = Path(os.environ["nnUNet_results"])  # noqa: SIM112
        return results / self.dataset / f"{self.trainer}__{self.plans}__{self.configuration}" / f"fold_{self.fold}"

    @property
    def is_done(self) -> bool:
        """Whether nnU-Net has validated it."""
        return (self.folder / "validation" / "summary.json").is_file()

    def note(self) -> None:
        """Note what nnU-Net does not, beside its results.

        Raises:
            SystemExit: the fold was begun with something else.
        """
        asked = {"device": self.device, "precision": self.precision, "seed": self.seed}
        path = self.folder / "learning.json"
        if path.is_file() and (noted := json.loads(path.read_text("utf-8"))) != asked:
            sys.exit(f"{self.folder} was begun with {noted}, not {asked}: name another nnUNet_results.")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asked))


def registered() -> list[str]:
    """All trainers of this package that train a network by themselves, nnU-Net's own first."""
    names = [m.trainer for m in aims.METHODS if not any(part in m.trainer for part in NEEDS_MORE)]
    return [aims.DEFAULT, *(name for name in names if name != aims.DEFAULT)]


def dataset_folder(dataset: str) -> Path:
    """Of the preprocessed data set."""
    return find_dataset(dataset, "-d", "nnUNet_preprocessed")


def with_batch_size(folder: Path, plans: str, size: int) -> str:
    """Name of these plans with another batch size in all configurations, written beside them."""
    content = json.loads((folder / f"{plans}.json").read_text(encoding="utf-8"))
    name = f"{plans}_batch{size}"
    for configuration in content["configurations"].values():
        if "batch_size" in configuration:
            configuration["batch_size"] = size
    write_text(folder / f"{name}.json", json.dumps({**content, "plans_name": name}, indent=4))
    return name


@contextmanager
def autocast(precision: str) -> Iterator[None]:
    """On the CPU: this precision where nnU-Net enters CUDA's autocast on a GPU."""
    import torch

    with ExitStack() as stack:
        for place in PLACES if precision != "float32" else ():
            stack.enter_context(patch(f"{place}.dummy_context", lambda: torch.autocast("cpu", torch.bfloat16)))
        yield


def start_anew(seed: int) -> None:
    """Set all random generators."""
    import numpy as np
    import torch

    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(seed)


def run(training: Training, log: Path) -> None:
    """Train and validate in this process; what it prints goes to the log."""
    import torch
    from nnunetv2.run.run_training import run_training

    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    training.note()
    start_anew(training.seed)
    with autocast(training.precision):
        run_training(
            training.dataset,
            training.configuration,
            training.fold,
            training.trainer,
            training.plans,
            continue_training=any(training.folder.glob("checkpoint_*.pth")),
            device=torch.device(training.device),
        )


def _end_with_parent() -> None:
    """However that ends."""
    if (parent := parent_process()) is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def run_all(
    trainings: Iterable[Training],
    jobs: int,
    *,
    workers: int = 0,
    seconds: float = math.inf,
    work: Callable[[Training, Path], None] = run,
) -> list[Training]:
    """Run what is not done, so many at a time, each in a process of its own; print how each ended.

    Returns:
        Those that failed.
    """
    os.environ |= {"nnUNet_n_proc_DA": str(workers), "nnUNet_def_n_proc": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    begin, processes = time.monotonic(), get_context("spawn")
    waiting, running, failed = [training for training in trainings if not training.is_done], {}, []
    logs = Path(os.environ["nnUNet_results"]) / "logs"  # noqa: SIM112
    logs.mkdir(parents=True, exist_ok=True)
    while (waiting or running) and time.monotonic() - begin < seconds:
        while waiting and len(running) < jobs:
            training = waiting.pop(0)
            running[training] = processes.Process(target=work, args=(training, logs / f"{training.name}.txt"))
            running[training].start()
        time.sleep(0.2)
        for training, process in list(running.items()):
            if not process.is_alive():
                del running[training]
                ended = "done" if training.is_done else f"failed ({process.exitcode}), see {logs}"
                failed += [] if training.is_done else [training]
                print(f"{time.monotonic() - begin:6.0f} s  {training.name}: {ended}", flush=True)
    for process in running.values():
        process.terminate()
        process.join()
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-d", "--dataset", required=True, help="its number or name")
    parser.add_argument("-c", "--configuration", default="3d_fullres")
    parser.add_argument("-p", "--plans", default="nnUNetPlans")
    parser.add_argument("--batch-size", type=int, default=2, help="instead of that of the plans (2)")
    parser.add_argument("--trainers", nargs="+", metavar="TRAINER[:PLANS]", default=registered(), help="(all)")
    parser.add_argument("--folds", nargs="+", default=["0"])
    parser.add_argument("--schedule", default="8epochs_125iters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--device", default="cpu", choices=("cuda", "cpu"))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (1)")
    parser.add_argument("--workers", type=int, default=0, help="that augment; 0: the seed gives the batches (0)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after these")
    args = parser.parse_args()
    if args.precision != "float32" and args.device == "cuda":
        parser.error("--precision is for the CPU: on CUDA nnU-Net trains in float16 autocast.")
    folder = dataset_folder(args.dataset)
    pairs = [(name, plans or args.plans) for name, _, plans in (t.partition(":") for t in args.trainers)]
    names = {plans: with_batch_size(folder, plans, args.batch_size) for _, plans in pairs}
    trainings = [
        Training(
            dataset=folder.name,
            configuration=args.configuration,
            trainer=f"{trainer}_{args.schedule}",
            plans=names[plans],
            fold=fold,
            device=args.device,
            precision=args.precision,
            seed=args.seed,
        )
        for fold in args.folds
        for trainer, plans in pairs
    ]
    sys.exit(1 if run_all(trainings, args.jobs, workers=args.workers, seconds=args.seconds) else 0)


if __name__ == "__main__":
    main()
