"""The steps of a demo: data, planning, trainings, predictions, report."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nnunet_ext import registry
from nnunet_ext.demo import dataset, phantom, report
from nnunet_ext.demo.settings import PLANS, Demo
from nnunet_ext.errors import UsageError
from nnunet_ext.files import writing
from nnunet_ext.nnunet.plans import read_plans
from nnunet_ext.whole import is_whole

_PREPROCESSED = (".pkl", ".b2nd", "_seg.b2nd")
_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")

_AGAIN = "delete it and call again"
Status = Callable[[str], None]
# Runs a command of the step of this name to its end and hands over what it writes.
RunCommand = Callable[[str, tuple[str, ...], Callable[[str], None]], None]


@dataclass(frozen=True)
class Step:
    """One step.

    Args:
        name: Name of its log and its marker.
        title: Title for people.
        inputs: The command that it runs, or what else decides its result.
        work: Does it; gets a callback for a short status.
        results: Tells whether all that it makes is there.
        needs: Names of the steps that it builds on.
    """

    name: str
    title: str
    inputs: tuple[str, ...]
    work: Callable[[Status], None]
    results: Callable[[], bool]
    needs: tuple[str, ...] = ()


def make_steps(demo: Demo, raw: dataset.RawDataset | None, run: RunCommand) -> list[Step]:
    """All steps of `demo` in their order; without `raw` the data set is the phantom."""
    steps = [_data(demo, raw), _plan(demo, run)]
    for make in (_train, _predict):
        steps += [make(demo, trainer, run) for trainer in demo.trainers]
    work = report.writer(demo, [step.inputs for step in steps if step.name != "data"])
    done = report.path(demo).is_file
    needs = tuple(step.name for step in steps)
    return [*steps, Step("report", "write the report", demo.trainers, work, done, needs)]


def _data(demo: Demo, raw: dataset.RawDataset | None) -> Step:
    def work(status: Status) -> None:
        if raw is None:
            phantom.write_dataset(demo.raw, phantom.PhantomSpec(), lambda i, n: status(f"scan {i}/{n}"))
        else:
            dataset.check(raw, lambda i, n: status(f"case {i}/{n}"))
            dataset.link(raw, demo.raw)

    title = "generate the phantom" if raw is None else f"check and link {raw.folder.name}"
    return Step("data", title, (demo.dataset,), work, lambda: (demo.raw / "dataset.json").is_file())


def _plan(demo: Demo, run: RunCommand) -> Step:
    options = f"-d {demo.dataset_id} -c {demo.configuration} --verify_dataset_integrity --no_pbar"
    processes = "" if demo.device == "cuda" else " -npfp 2 -np 2"
    command = ("nnUNetv2_plan_and_preprocess", *(options + processes).split())

    def work(status: Status) -> None:
        _remove(demo.preprocessed)  # nnU-Net would trust a fingerprint that was cut off
        run("plan", command, lambda _: status(""))
        configurations = read_plans(demo.preprocessed / f"{PLANS}.json", _AGAIN)["configurations"]
        if demo.configuration not in configurations:
            raise UsageError(
                f"-c needs a configuration that nnU-Net planned for {demo.dataset} "
                f"({', '.join(configurations)}), got {demo.configuration}: choose one, and another --output."
            )

    def results() -> bool:
        plans = demo.preprocessed / f"{PLANS}.json"
        if not plans.is_file():
            return False
        folder = demo.preprocessed / str(
            read_plans(plans, _AGAIN)["configurations"].get(demo.configuration, {}).get("data_identifier")
        )
        return all(is_whole(folder / f"{case}{end}") for case in demo.cases("Tr") for end in _PREPROCESSED)

    return Step("plan", "plan and preprocess", command, work, results, ("data",))


def _train(demo: Demo, trainer: str, run: RunCommand) -> Step:
    scheduled = demo.scheduled(trainer)
    options = f"{demo.dataset_id} {demo.configuration} {report.FOLD} -tr {scheduled} -device {demo.device}"
    command = ("nnUNetv2_train", *options.split())
    fold = demo.model(trainer) / f"fold_{report.FOLD}"
    schedule = registry.parse_schedule(scheduled)

    def work(status: Status) -> None:
        watch = EpochWatch(schedule.epochs if schedule else None)
        run(f"train_{scheduled}", (*command, *_continue_option(fold)), lambda text: status(watch.read(text)))

    def results() -> bool:
        return is_whole(fold / _CHECKPOINTS[0]) and is_whole(fold / "validation" / "summary.json")

    return Step(f"train_{scheduled}", f"train {trainer}", command, work, results, ("plan",))


def _predict(demo: Demo, trainer: str, run: RunCommand) -> Step:
    scheduled, folder = demo.scheduled(trainer), demo.predictions(trainer)
    options = f"-d {demo.dataset_id} -c {demo.configuration} -f {report.FOLD} -tr {scheduled} -chk {_CHECKPOINTS[0]}"
    options += f" -npp 1 -nps 1 --disable_progress_bar -device {demo.device}"
    command = ("nnUNetv2_predict", "-i", str(demo.raw / "imagesTs"), "-o", str(folder), *options.split())

    def work(status: Status) -> None:
        _remove(folder)
        run(f"predict_{scheduled}", command, lambda _: status(""))

    def results() -> bool:
        return dataset.are_predicted(demo.raw, folder, demo.cases("Ts"))

    title, needs = f"predict with {trainer}", (f"train_{scheduled}",)
    return Step(f"predict_{scheduled}", title, command, work, results, needs)


def _remove(folder: Path) -> None:
    with writing(folder):
        if folder.is_dir():
            shutil.rmtree(folder)


def _continue_option(fold: Path) -> tuple[str, ...]:
    """`--c` where a whole checkpoint lies; one that was cut off while it was written is deleted."""
    paths = [fold / name for name in _CHECKPOINTS]
    for path in paths:
        if path.is_file() and not zipfile.is_zipfile(path):
            with writing(path):
                path.unlink()
    return ("--c",) if any(path.is_file() for path in paths) else ()


class EpochWatch:
    """Reads the output of a training and says how far it is.

    Args:
        epochs: Number of epochs, None where it is not known.
    """

    def __init__(self, epochs: int | None) -> None:
        self._of = "" if epochs is None else f"/{epochs}"
        self._text = ""

    def read(self, text: str) -> str:
        """Take the next piece of output; return the status, empty before the first epoch."""
        self._text = (self._text + text)[-8000:]
        epochs = re.findall(r"Epoch (\d+)\s", self._text)
        losses = re.findall(r"train_loss (-?\d+\.\d+)", self._text)
        if not epochs:
            return ""
        loss = f", training loss {float(losses[-1]):.2f}" if losses else ""
        return f"epoch {int(epochs[-1]) + 1}{self._of}{loss}"
