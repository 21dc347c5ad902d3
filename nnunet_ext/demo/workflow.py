"""The steps of a demo, one after the other; one whose output is there and whole is skipped.

Before a step is done, its output and all that is made from it are removed, also of trainers that this call does not
name: whenever a demo is interrupted, no result is older than what it is made from. A training that is itself repeated
keeps its checkpoints and goes on from the last one.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nnunet_ext import registry
from nnunet_ext.demo import commands, dataset, phantom, report
from nnunet_ext.demo.settings import AGAIN, PLANS, Demo
from nnunet_ext.errors import UsageError
from nnunet_ext.files import PARTIAL, locked, read_json, write_text, writing
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT, whole_checkpoints
from nnunet_ext.nnunet.datasets import number_of
from nnunet_ext.nnunet.plans import configuration, read_plans
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.whole import is_whole

Status = Callable[[str], None]
Say = Callable[[str, bool], None]  # takes a line, and whether it stays or the next one replaces it


@dataclass(frozen=True, kw_only=True)
class DemoStep:
    """One step.

    Args:
        name: Name of its log.
        title: Title for people.
        removed: Its output, then all that is made from it; removed, in this order, before it is done.
        is_done: Whether the output is there and whole.
        make: Command that makes it, or a function, which gets a callback for a short status.
        fold: Folder with the checkpoints of a training.
    """

    name: str
    title: str
    removed: tuple[Path, ...]
    is_done: Callable[[], bool]
    make: list[str] | Callable[[Status], None]
    fold: Path | None = None


def run(demo: Demo, say: Say) -> None:
    """Run the demo in its folder, or finish the one that an earlier call began there.

    Raises:
        CommandError: a command of nnU-Net failed.
        UsageError: the options, the data set or the folder don't allow it.
    """
    demo = replace(demo, trainers=tuple(dict.fromkeys(demo.trainers)))
    for trainer in demo.trainers:
        try:
            with redirect_stdout(io.StringIO()):  # nnU-Net prints when it is imported
                trainer_class(demo.scheduled(trainer))
        except UsageError as error:
            options = "--trainers with --schedule (such as 9epochs_20iters, or full)"
            raise UsageError(f"{options}: {error}") from error
    raw = None if demo.raw is None else dataset.read_raw(demo.raw)
    with _opened(demo) as settled:
        names = ", ".join(demo.trainers)
        say(f"Demo in {demo.root}", True)
        say(f"{', '.join(demo.variables)} of the demo lie there; your own are left alone.", True)
        say(f"{demo.dataset}, {demo.configuration}, {demo.schedule}, {settled.device}: {names}", True)
        steps = make_steps(settled, raw)
        for number, step in enumerate(steps, start=1):
            line = f"[{number}/{len(steps)}] {step.title}"
            if step.is_done():
                say(f"{line}: done by an earlier run", True)
                continue
            for path in step.removed:
                _remove(path)
            _do(settled, step, line, say)
    for line in (*report.summary(demo), f"Report: {report.path(demo)}"):
        say(line, True)


def make_steps(demo: Demo, raw: dataset.RawDataset | None) -> list[DemoStep]:
    """All steps of `demo` in their order; without `raw` the data set is the phantom."""
    number, few = number_of(demo.dataset), "" if demo.device == "cuda" else " -npfp 2 -np 2"
    which, device = f"-d {number} -c {demo.configuration}", f"-device {demo.device}"
    plan = f"nnUNetv2_plan_and_preprocess {which} --verify_dataset_integrity --no_pbar{few}".split()
    of_plan = (demo.preprocessed, demo.variables["nnUNet_results"], demo.root / "predictions", report.path(demo))
    trainings, predictions = [], []
    for trainer in demo.trainers:
        name, title, fold = demo.scheduled(trainer), f"train {trainer}", demo.model(trainer) / "fold_0"
        removed = (fold / "validation", demo.predictions(trainer), report.path(demo))
        command = f"nnUNetv2_train {number} {demo.configuration} 0 -tr {name} {device}".split()
        is_done = partial(_are_whole, [fold / FINAL_CHECKPOINT, fold / "validation" / "summary.json"])
        trainings += [
            DemoStep(name=f"train_{name}", title=title, removed=removed, is_done=is_done, make=command, fold=fold)
        ]
    for trainer in demo.trainers:
        name, title, output = demo.scheduled(trainer), f"predict with {trainer}", demo.predictions(trainer)
        options = f"{which} -f 0 -tr {name} -chk {FINAL_CHECKPOINT} -npp 1 -nps 1 --disable_progress_bar {device}"
        command = ["nnUNetv2_predict", "-i", str(demo.data / "imagesTs"), "-o", str(output), *options.split()]
        is_done = partial(dataset.are_predicted, demo, output)
        predictions += [
            DemoStep(
                name=f"predict_{name}", title=title, removed=(output, report.path(demo)), is_done=is_done, make=command
            )
        ]
    title = "generate the phantom" if raw is None else f"check and link {raw.folder.name}"
    ran = [plan, *(step.make for step in (*trainings, *predictions) if isinstance(step.make, list))]
    make, write = partial(_make_data, demo, raw), partial(report.write, demo, ran)
    return [
        DemoStep(
            name="data",
            title=title,
            removed=(demo.data, *of_plan),
            is_done=(demo.data / "dataset.json").is_file,
            make=make,
        ),
        DemoStep(
            name="plan", title="plan and preprocess", removed=of_plan, is_done=partial(_is_planned, demo), make=plan
        ),
        *trainings,
        *predictions,
        DemoStep(
            name="report",
            title="write the report",
            removed=(report.path(demo),),
            is_done=partial(report.is_of, demo),
            make=write,
        ),
    ]


@contextmanager
def _opened(demo: Demo) -> Iterator[Demo]:
    """Hold the demo's folder, which notes the options, and give the demo with its device.

    Trainers may differ: each has folders of its own, so that one can be added to a demo.
    """
    import torch

    note = demo.root / "demo.json"
    with writing(demo.root):
        demo.root.mkdir(parents=True, exist_ok=True)
        foreign = sorted(p.name for p in demo.root.iterdir() if not p.name.startswith(("demo.", PARTIAL)))
    if foreign and not note.is_file():
        raise UsageError(
            f"--output needs an empty folder or that of a demo, {demo.root} holds {foreign[0]}: choose another."
        )
    with locked(demo.root / "demo.lock"):
        if left := commands.processes(demo.root):
            raise UsageError(
                f"another run is at work in {demo.root}, process {left[0].pid} of a demo that was killed: wait for "
                "its end or stop it, or choose another output folder."
            )
        held = read_json(note, AGAIN) if note.is_file() else {}
        default = "cuda" if torch.cuda.is_available() else "cpu"
        demo = replace(demo, device=demo.device or held.get("device") or default)
        asked = {"raw": demo.raw and str(demo.raw), "schedule": demo.schedule}
        asked |= {"configuration": demo.configuration, "device": demo.device}
        changed = [f"{key} {held.get(key)}, now {asked[key]}" for key in asked if held.get(key) != asked[key]]
        if held and changed:
            raise UsageError(
                f"{demo.root} holds a demo with other options ({'; '.join(changed)}): "
                "choose another folder by --output, or delete this one."
            )
        if not held:
            write_text(note, json.dumps(asked, indent=2) + "\n")
        yield demo


def _do(demo: Demo, step: DemoStep, line: str, say: Say) -> None:
    start, log = time.monotonic(), demo.root / "logs" / f"{step.name}.log"

    def status(text: str) -> None:
        say(f"{line}: {text and f'{text}, '}{time.monotonic() - start:.0f} s", False)

    say(f"{line} ...", False)
    if isinstance(step.make, list):
        command = [*step.make, *_continue_option(step.fold)]
        commands.run(command, log, demo, lambda text: status(epoch(text, demo.schedule)))
    else:
        step.make(status)
    if not step.is_done():
        raise commands.CommandError(
            f"the step {step.name!r} ended without an error and without its results; log: {log}"
        )
    say(f"{line}: done in {time.monotonic() - start:.0f} s", True)


def _make_data(demo: Demo, raw: dataset.RawDataset | None, status: Status) -> None:
    if raw is None:
        phantom.write_dataset(demo.data, phantom.PhantomSpec(), lambda i, n: status(f"scan {i}/{n}"))
    else:
        dataset.check(raw, lambda i, n: status(f"case {i}/{n}"))
        dataset.link(raw, demo.data)


def _is_planned(demo: Demo) -> bool:
    plans = demo.preprocessed / f"{PLANS}.json"
    if not is_whole(plans):
        return False
    planned = configuration(read_plans(plans, AGAIN), demo.configuration)
    data, truth = demo.preprocessed / planned["data_identifier"], demo.preprocessed / "gt_segmentations"
    cases, ending = demo.cases("Tr"), demo.file_ending
    files = [data / f"{case}{end}" for case in cases for end in (".pkl", ".b2nd", "_seg.b2nd")]
    return _are_whole([*files, *(truth / f"{case}{ending}" for case in cases)])  # copied last


def _are_whole(paths: Iterable[Path]) -> bool:
    return all(map(is_whole, paths))


def _continue_option(fold: Path | None) -> tuple[str, ...]:
    """`--c` where a checkpoint lies."""
    return ("--c",) if fold and whole_checkpoints(fold) else ()


def _remove(path: Path) -> None:
    with writing(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def epoch(text: str, schedule: str) -> str:
    """How far a training is, by the end of its output; empty before the first epoch."""
    epochs, losses = re.findall(r"Epoch (\d+)\s", text), re.findall(r"train_loss (-?\d+\.\d+)", text)
    if not epochs:
        return ""
    asked = registry.parse_schedule(f"{registry.CORE_TRAINER}_{schedule}")
    of = f"/{asked.epochs}" if asked and asked.epochs else ""
    loss = f", training loss {float(losses[-1]):.2f}" if losses else ""
    return f"epoch {int(epochs[-1]) + 1}{of}{loss}"
