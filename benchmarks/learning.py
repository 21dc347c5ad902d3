"""Trains default nnU-Net, its rivals and every registered trainer on one data set, under one schedule.

python benchmarks/learning.py -d 4 --schedule 8epochs_125iters [--trainers TRAINER[:PLANS] ...] [--folds 0] [--jobs 1]

Needs a planned and preprocessed data set. nnU-Net's own training and validation, written into nnUNet_results for
`nnunet-ext compare`; all trainings see the batches that one seed gives. What is validated already is left out and what
has a checkpoint goes on, so that the same command continues where it was stopped. On the CPU `--precision bfloat16`
enters the CPU's autocast where nnU-Net enters CUDA's, in training and prediction.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

from nnunet_ext import registry
from nnunet_ext.aims import DEFAULT

PRECISIONS = ("float32", "bfloat16")
PLACES = ("nnunetv2.training.nnUNetTrainer.nnUNetTrainer", "nnunetv2.inference.predict_from_raw_data")
CANNOT_TRAIN_ALONE = ("Cascade", "Distilled", "Deployed")  # need other plans, a teacher; can't train


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

    @property
    def folder(self) -> Path:
        """Where nnU-Net writes it."""
        results = Path(os.environ["nnUNet_results"])  # noqa: SIM112
        return results / self.dataset / f"{self.trainer}__{self.plans}__{self.configuration}" / f"fold_{self.fold}"

    @property
    def has_begun(self) -> bool:
        """Whether there is a checkpoint that nnU-Net goes on from."""
        return any(self.folder.glob("checkpoint_*.pth"))

    @property
    def is_done(self) -> bool:
        """Whether nnU-Net has validated it."""
        return (self.folder / "validation" / "summary.json").is_file()


def registered() -> list[str]:
    """nnU-Net's own trainer first, then all registered ones that train a network by themselves."""
    names = [entry.name for entry in registry.entries("trainers")]
    return [DEFAULT, *(n for n in names if n != DEFAULT and not any(part in n for part in CANNOT_TRAIN_ALONE))]


def dataset_folder(number: str) -> Path:
    """Of the preprocessed data set."""
    (folder,) = Path(os.environ["nnUNet_preprocessed"]).glob(f"Dataset{int(number):03d}_*")  # noqa: SIM112
    return folder


def with_batch_size(folder: Path, plans: str, size: int) -> str:
    """Name of these plans with another batch size in all configurations, written beside them."""
    content = json.loads((folder / f"{plans}.json").read_text(encoding="utf-8"))
    name = f"{plans}_batch{size}"
    for configuration in content["configurations"].values():
        if "batch_size" in configuration:
            configuration["batch_size"] = size
    (folder / f"{name}.json").write_text(json.dumps({**content, "plans_name": name}, indent=4), encoding="utf-8")
    return name


def run(training: Training, log: Path) -> None:
    """Train and validate in this process; what it prints goes to the log."""
    import numpy as np
    import torch
    from nnunetv2.run.run_training import run_training

    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    with ExitStack() as stack:
        if training.precision == "bfloat16":
            for place in PLACES:
                autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
                stack.enter_context(patch(f"{place}.dummy_context", autocast))
        run_training(
            training.dataset,
            training.configuration,
            training.fold,
            training.trainer,
            training.plans,
            continue_training=training.has_begun,
            device=torch.device(training.device),
        )


def run_all(
    trainings: Iterable[Training], jobs: int, seconds: float = math.inf, work: Callable[[Training, Path], None] = run
) -> None:
    """Run what is not done, so many at a time, each in a process of its own, and print how each ended."""
    # In the process of the training, so that the seed gives its batches.
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    begin, processes = time.monotonic(), get_context("spawn")
    waiting, running = [training for training in trainings if not training.is_done], {}
    logs = Path(os.environ["nnUNet_results"]) / "logs"  # noqa: SIM112
    logs.mkdir(parents=True, exist_ok=True)
    while (waiting or running) and time.monotonic() - begin < seconds:
        while waiting and len(running) < jobs:
            training = waiting.pop(0)
            log = logs / f"{training.trainer}__{training.plans}__{training.fold}.txt"
            process = processes.Process(target=work, args=(training, log))
            process.start()
            running[training] = process
        time.sleep(0.2)
        for training, process in list(running.items()):
            if not process.is_alive():
                del running[training]
                ended = "done" if training.is_done else f"failed ({process.exitcode}), see {logs}"
                print(f"{time.monotonic() - begin:6.0f} s  {training.trainer} {training.fold}: {ended}", flush=True)
    for process in running.values():
        process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-d", "--dataset", required=True, help="its number")
    parser.add_argument("-c", "--configuration", default="3d_fullres")
    parser.add_argument("-p", "--plans", default="nnUNetPlans")
    parser.add_argument("--batch-size", type=int, default=2, help="instead of that of the plans (2)")
    parser.add_argument("--trainers", nargs="+", metavar="TRAINER[:PLANS]", default=registered(), help="(all)")
    parser.add_argument("--folds", nargs="+", default=["0"])
    parser.add_argument("--schedule", default="8epochs_125iters")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--device", default="cpu", choices=("cuda", "cpu"))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (1)")
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
        )
        for fold in args.folds
        for trainer, plans in pairs
    ]
    run_all(trainings, args.jobs, args.seconds)


if __name__ == "__main__":
    main()
