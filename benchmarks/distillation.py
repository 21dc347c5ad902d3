"""Teachers, students and students without a teacher, trained side by side under one schedule, and what they predict.

python benchmarks/distillation.py -d 4 --images UNSEEN --schedule 8epochs_250iters --output FOLDER [--jobs 8]

Needs a planned and preprocessed data set, and images that it does not hold. Trains five folds of nnU-Net's own trainer;
of each student, with a teacher and without, the first one's five folds and of all the model of all cases. Then each
predicts the unseen images, the teacher by one fold and by all; last, one after the other on the same images, the time
of a case. Everything is in FOLDER, laid out as nnU-Net's results, for `nnunet-ext compare`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TEACHER = "nnUNetTrainer"
STUDENTS = ["nnUNetTrainerHalfWidthBN", "nnUNetTrainerFasterFusionBN", "nnUNetTrainerImplicitLite"]
FOLDS = ["0", "1", "2", "3", "4"]
TRAIN = "import sys; from nnunetv2.run.run_training import run_training_entry; sys.exit(run_training_entry())"
# Of all cases nnU-Net would validate what it has trained on.
TRAIN_ON_ALL = """
import sys, torch
from nnunetv2.run.run_training import get_trainer_from_args
dataset, configuration, trainer, plans, device = sys.argv[1:]
torch.backends.cudnn.benchmark = device == "cuda"
get_trainer_from_args(dataset, configuration, "all", trainer, plans, device=torch.device(device)).run_training()
"""
PREDICT = """
import sys
from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder
sys.exit(predict_entry_point_modelfolder())
"""
TIME = """
import json, sys, time, torch
from pathlib import Path
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
images, output, device, *models = sys.argv[1:]
cases, found = sorted(Path(images).iterdir())[:20], {}
for entry in models:
    model, *folds = entry.split(":")
    predictor = nnUNetPredictor(device=torch.device(device), perform_everything_on_device=device == "cuda")
    predictor.initialize_from_trained_model_folder(model, folds, "checkpoint_final.pth")
    times = []
    for case in [*cases[:2], *cases]:
        image, properties = predictor.plans_manager.image_reader_writer_class().read_images([str(case)])
        start = time.perf_counter()
        predictor.predict_single_npy_array(image, properties)
        times.append(time.perf_counter() - start)
    weights = sum(p.numel() for p in predictor.network.parameters()) * len(folds)
    found[entry] = {"seconds": times[2:], "weights": weights}
    Path(output).write_text(json.dumps(found))
"""


@dataclass(kw_only=True)
class Job:
    """A process, and the names of those that must have ended well before it."""

    name: str
    command: list[str]
    after: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    alone: bool = False


def training(args: argparse.Namespace, trainer: str, fold: str, teachers: list[str]) -> Job:
    name = f"{trainer}_{args.schedule}"
    if fold == "all":
        options = [TRAIN_ON_ALL, args.dataset, args.configuration, name, args.plans, args.device]
    else:
        options = [TRAIN, args.dataset, args.configuration, fold, "-tr", name, "-p", args.plans, "-device", args.device]
    taught = {"nnUNet_teacher": folder(args, TEACHER)} if teachers else {}
    command = [sys.executable, "-c", *options]
    return Job(name=f"{trainer} {fold}", command=command, after=teachers, environment=taught)


def folder(args: argparse.Namespace, trainer: str) -> str:
    return f"{trainer}_{args.schedule}__{args.plans}__{args.configuration}"


def model(args: argparse.Namespace, trainer: str) -> Path:
    preprocessed = Path(os.environ["nnUNet_preprocessed"])  # noqa: SIM112
    (dataset,) = preprocessed.glob(f"Dataset{int(args.dataset):03d}_*")
    return args.output / dataset.name / folder(args, trainer)


def predicting(args: argparse.Namespace, trainer: str, folds: list[str], label: str) -> Job:
    options = ["-i", str(args.images), "-o", str(args.output / "predictions" / label), "-m", str(model(args, trainer))]
    options += ["-f", *folds, "-npp", "1", "-nps", "1", "-device", args.device]
    after = [f"{trainer} {fold}" for fold in folds]
    return Job(name=f"predict {label}", command=[sys.executable, "-c", PREDICT, *options], after=after)


def all_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """In the order in which they are to begin where there is room."""
    every = [f"{TEACHER} {fold}" for fold in FOLDS]
    for fold in FOLDS:
        yield training(args, TEACHER, fold, [])
    for student in args.students:
        yield training(args, student, "all", [])
    for student in args.students:
        yield training(args, f"{student}Distilled", "all", every)
    for fold in FOLDS[: args.folds]:
        yield training(args, args.students[0], fold, [])
        yield training(args, f"{args.students[0]}Distilled", fold, [f"{TEACHER} {fold}"])
    yield predicting(args, TEACHER, FOLDS, "ensemble")
    yield predicting(args, TEACHER, FOLDS[:1], "one_fold")
    for student in args.students:
        for trainer in (student, f"{student}Distilled"):
            yield predicting(args, trainer, ["all"], trainer)
    timed = [f"{model(args, TEACHER)}:{':'.join(FOLDS)}", f"{model(args, TEACHER)}:0"]
    timed += [f"{model(args, f'{student}Distilled')}:all" for student in args.students]
    command = [sys.executable, "-c", TIME, str(args.images), str(args.output / "seconds.json"), args.device, *timed]
    after = every + [f"{student}Distilled all" for student in args.students]
    yield Job(name="seconds", command=command, after=after, alone=True)


def run(args: argparse.Namespace) -> dict[str, float | None]:
    """Seconds of each job; None for those that failed or were not begun in time."""
    common = {**os.environ, "nnUNet_results": str(args.output), "nnUNet_n_proc_DA": str(args.workers)}
    common |= {"nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}
    waiting, running, ended = list(all_jobs(args)), dict[str, tuple[subprocess.Popen[bytes], float]](), {}
    (args.output / "logs").mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    while (waiting or running) and time.monotonic() - begin < args.seconds:
        for job in list(waiting):
            is_next = len(running) < args.jobs if not job.alone else not running and len(waiting) == 1
            if is_next and all(ended.get(name) is not None for name in job.after):
                log = (args.output / "logs" / f"{job.name}.txt".replace(" ", "_")).open("w")
                process = subprocess.Popen(
                    job.command, env={**common, **job.environment}, stdout=log, stderr=subprocess.STDOUT
                )
                running[job.name] = (process, time.monotonic())
                waiting.remove(job)
            elif any(name in ended and ended[name] is None for name in job.after):
                ended[job.name] = None
                waiting.remove(job)
        time.sleep(0.2)
        for name, (process, start) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                ended[name] = time.monotonic() - start if process.returncode == 0 else None
                print(f"{time.monotonic() - begin:6.0f} s  {name}: {process.returncode}", flush=True)
    for name, (process, _) in running.items():
        process.kill()
        ended[name] = None
    return ended | {job.name: None for job in waiting}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-d", "--dataset", required=True)
    parser.add_argument("-c", "--configuration", default="3d_fullres")
    parser.add_argument("-p", "--plans", default="nnUNetPlans")
    parser.add_argument("--images", type=Path, required=True, help="folder of unseen images")
    parser.add_argument("--schedule", default="8epochs_250iters")
    parser.add_argument("--students", nargs="+", default=STUDENTS, metavar="TRAINER", help="without Distilled")
    parser.add_argument("--folds", type=int, default=5, help="folds of the first student (5)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (2)")
    parser.add_argument("--workers", type=int, default=1, help="processes that augment for each training (1)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after these")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output = args.output.absolute()
    seconds = run(args)
    (args.output / "jobs.json").write_text(json.dumps(seconds, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
