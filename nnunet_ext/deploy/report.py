"""What each step from the trained ensemble to the shipped folder saves: whole predictions, from file to file.

Every row is a process of its own, started as a user does: nnU-Net's command, or `predict.py` of an exported folder. On
large images they take hours: each is kept when it is there, and the same command goes on after them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from nnunet_ext import __version__, extras
from nnunet_ext.architectures.deployed import NothingToFuseError, fused
from nnunet_ext.deploy.folder import check_new, write_json
from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.deploy.ship import DeployOptions, ship
from nnunet_ext.deploy.standalone import predict
from nnunet_ext.deploy.standalone.description import check_supported
from nnunet_ext.deploy.standalone.export import Engine, ExportOptions, export
from nnunet_ext.deploy.standalone.parity import cases_of, difference, mean_dice, references_of, threads_of_environment
from nnunet_ext.deploy.watched import Usage, run
from nnunet_ext.errors import UsageError
from nnunet_ext.escaping import markdown_cell, markdown_table
from nnunet_ext.files import check_folder, locked, partial, read_json, whole_folder, write_files, write_text, writing
from nnunet_ext.style import page, rendered, tidy

_NNUNET = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as main; main()"
_TORCH_RESAMPLING = {"is_seg": False, "force_separate_z": None, "memefficient_seg_resampling": False}
_GIB = 2**30
_UNFINISHED = "unfinished"  # folder in that of the report, until all rows are there
_CHAIN, _ROWS, _FIRST, _LOCK, _RESULT = "chain.json", "rows.json", "first", "report.lock", "speed.json"
_AGAIN = "delete the folder of the report, and start again"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One way to predict.

    Args:
        name: What is changed.
        command: To predict, without images and output.
    """

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to predict, measured.

    Args:
        name: See `Step`.
        usage: What it took for all images.
        equal: Share of voxels with the label of the first row.
        dice: Mean Dice against the references; None without.
    """

    name: str
    usage: Usage
    equal: float
    dice: float | None


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What is measured.

    Args:
        model: Trained folds.
        images: Folder of scans.
        references: Folder of their segmentations; None: no Dice.
        engines: Keys of `predict.ENGINES`; the last one is that of the chain.
        calibration: Folder of scans that calibrate int8; None: `images`.
        student: A smaller trained model of the same data, the end of the chain; None: one fold of `model` is.
    """

    model: TrainedModel
    images: Path
    references: Path | None
    engines: Sequence[Engine]
    calibration: Path | None = None
    student: TrainedModel | None = None

    @property
    def options(self) -> ExportOptions:
        """How models are exported; they are compared here, not there."""
        return ExportOptions(engines=self.engines, calibration=self.calibration or self.images)

    def check(self) -> None:
        """See that nothing is missing, before hours are spent.

        nnU-Net reads checkpoints as pickles, which can run anything: each is read without that first.

        Raises:
            UsageError: names what.
        """
        extras.need("report", "--report")
        self.options.check()
        if self.calibration is not None:
            cases_of(self.calibration, str(self.model.setting.dataset["file_ending"]))
        for model in filter(None, (self.model, self.student)):
            check_supported(model.setting)
            for fold in model.checkpoints:
                model.weights(fold)


def report(chain: Chain, output: Path, show: Callable[[str], None] = lambda what: None) -> tuple[Row, ...]:
    """Measure each step alone and all together; write speed.md, speed.json and speed.svg, anew after each row.

    Args:
        chain: What is measured.
        output: A folder that does not exist yet, or in which the same chain was not measured to its end.
        show: Called before each piece of work.

    Raises:
        UsageError: `output` holds something else, a prediction fails, an engine is missing.
    """
    _check_output(output)
    ending = str(chain.model.setting.dataset["file_ending"])
    cases = cases_of(chain.images, ending)
    labelled = references_of(chain.references, cases, ending)
    chain.check()
    resamples = _resamples(chain.model, cases.values())
    with _unfinished(output, _identity(chain, ending)) as work:
        rows, predicted = _rows(work), work / "predicted"
        for step in _steps(chain, resamples, work, show):
            if any(row.name == step.name for row in rows):
                continue
            show(step.name)
            shutil.rmtree(predicted, ignore_errors=True)
            usage = run([*step.command, "-i", str(chain.images), "-o", str(predicted)], step.name)
            if not rows:
                shutil.rmtree(work / _FIRST, ignore_errors=True)
                shutil.copytree(predicted, work / _FIRST)
            rows.append(_row(step.name, usage, work / _FIRST, predicted, labelled, list(cases), chain.model))
            write_text(work / _ROWS, json.dumps({"rows": [asdict(row) for row in rows]}))
            _write(output, rows, chain, list(cases))
        _write(output, rows, chain, list(cases))  # where an earlier run was killed before it had
    return tuple(rows)


def _check_output(output: Path) -> None:
    if not any((output / name).exists() for name in (_UNFINISHED, _LOCK)):
        check_new(output)
    check_folder(output)


def _identity(chain: Chain, ending: str) -> str:
    """What makes rows comparable: models, scans, engines, threads and versions, as a checksum."""
    models = [model for model in (chain.model, chain.student) if model is not None]
    folders = {"-i": chain.images, "--calibrate": chain.calibration}
    scans = {
        option: [file for files in cases_of(folder, ending).values() for file in files]
        for option, folder in folders.items()
        if folder is not None
    }
    if chain.references is not None:
        scans["-ref"] = sorted(chain.references.glob(f"*{ending}"))
    content = {
        "version": __version__,
        "models": [[model.trainer, model.setting.plans, model.setting.dataset] for model in models],
        "weights": [{fold: predict.sha256(path) for fold, path in model.checkpoints.items()} for model in models],
        "scans": {option: {file.name: predict.sha256(file) for file in files} for option, files in scans.items()},
        "engines": list(chain.engines),
        "threads": threads_of_environment(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def _unfinished(output: Path, identity: str) -> Iterator[Path]:
    """Make the folder of what is needed until the last row, or take that of a run that ended early; delete it."""
    work, lock = output / _UNFINISHED, output / _LOCK
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    with locked(lock):
        if _rows(work):
            if read_json(work / _CHAIN, _AGAIN) != {"chain": identity}:
                raise UsageError(
                    f"-o {output} holds rows of other models, scans, engines, threads or versions, not all of them are "
                    "there: choose another folder, or delete it."
                )
        else:
            if (output / _RESULT).exists():  # another run has ended meanwhile
                check_new(output)
            with whole_folder(work, replace=True) as made:
                write_json(made / _CHAIN, {"chain": identity})
        try:
            yield work
        except BaseException:
            if not _rows(work):
                _delete(work, lock)
                with suppress(OSError):
                    output.rmdir()
            raise
        _delete(work, lock)


def _delete(work: Path, lock: Path) -> None:
    gone = partial(work)
    work.rename(gone)  # at once: what is left of it is never taken for rows
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):  # Windows keeps a file that is open
        lock.unlink()


def _rows(work: Path) -> list[Row]:
    """Read what earlier runs have measured."""
    if not (work / _ROWS).is_file() or not (work / _FIRST).is_dir():
        return []
    return [Row(**{**row, "usage": Usage(**row["usage"])}) for row in read_json(work / _ROWS, _AGAIN)["rows"]]


def _steps(chain: Chain, resamples: bool, work: Path, show: Callable[[str], None]) -> Iterable[Step]:
    """How nnU-Net predicts; each factor alone; the chain."""
    model, folds = chain.model, list(chain.model.checkpoints)
    ensemble = f"{len(folds)} folds" if len(folds) > 1 else "one fold"
    yield Step(name=f"nnU-Net: {ensemble}, mirroring", command=_nnunet(model.folder, folds, model))
    if len(folds) > 1:
        yield Step(name="one fold", command=_nnunet(model.folder, folds[:1], model))
    yield Step(name="no mirroring", command=(*_nnunet(model.folder, folds, model), "--disable_tta"))
    yield Step(name="step 0.75", command=(*_nnunet(model.folder, folds, model), "-step_size", "0.75"))
    if resamples:
        resampled = _once(work / "resampled", lambda folder: _with_torch_resampling(model, folder))
        yield Step(name="torch resampling", command=_nnunet(resampled, folds, model))
    if _fuses(model):
        show("fusing")
        fused_model = _once(work / "fused", lambda folder: ship(model, folder, DeployOptions()))
        yield Step(name="fused", command=_nnunet(fused_model, folds, model, "checkpoint_final.pth"))
    student = chain.student
    if student is not None:
        command = _nnunet(student.folder, list(student.checkpoints), student)
        yield Step(name=f"student: {student.trainer}", command=command)
    show("exporting")
    exported = _once(work / "exported", lambda folder: export(model, folder, chain.options, show))
    for engine in chain.engines:
        yield Step(name=f"predict.py, {engine}", command=_alone(exported, engine))
    last = chain.engines[-1]
    if len(folds) > 1:
        yield Step(name=f"{ensemble}, no mirroring, {last}", command=(*_alone(exported, last), "--disable_tta"))
    yield Step(name=f"one fold, no mirroring, {last}", command=_end(exported, last, model))
    if student is not None:
        show("exporting the student")
        small = _once(work / "student", lambda folder: export(student, folder, chain.options, show))
        yield Step(name=f"student, one fold, no mirroring, {last}", command=_end(small, last, student))


def _once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that an earlier run may have made; it is whole, or not there."""
    if not folder.exists():
        make(folder)
    return folder


def _nnunet(folder: Path, folds: Sequence[str], model: TrainedModel, checkpoint: str | None = None) -> tuple[str, ...]:
    name = checkpoint or next(iter(model.checkpoints.values())).name
    return (sys.executable, "-c", _NNUNET, "-m", str(folder), "-f", *folds, "-chk", name, "-device", "cpu")


def _alone(folder: Path, engine: str) -> tuple[str, ...]:
    return (sys.executable, str(folder / "predict.py"), "--engine", engine, "--threads", threads_of_environment())


def _end(folder: Path, engine: str, model: TrainedModel) -> tuple[str, ...]:
    return (*_alone(folder, engine), "-f", next(iter(model.checkpoints)), "--disable_tta")


def _resamples(model: TrainedModel, cases: Iterable[Sequence[Path]]) -> bool:
    """Whether any scan has another spacing than the network; every file is read, before hours are spent on them.

    Raises:
        UsageError: a file is no complete image.
    """
    try:
        spacings = [sorted(predict.read_file(file).GetSpacing()) for files in cases for file in files]
    except predict.PredictionError as error:
        raise UsageError(str(error)) from error
    wanted = sorted(model.setting.configuration_manager.spacing)
    return any(len(found) != len(wanted) or not np.allclose(found, wanted) for found in spacings)


def _fuses(model: TrainedModel) -> bool:
    try:
        fused(model.trained_network(next(iter(model.checkpoints))))
    except NothingToFuseError:
        return False
    return True


def _with_torch_resampling(model: TrainedModel, output: Path) -> None:
    """Write the model with nnU-Net's own faster resampling of logits."""
    plans = copy.deepcopy(dict(model.setting.plans))
    configuration = plans["configurations"][model.setting.configuration]
    configuration["resampling_fn_probabilities"] = "resample_torch_fornnunet"
    configuration["resampling_fn_probabilities_kwargs"] = _TORCH_RESAMPLING
    with whole_folder(output) as folder:
        write_json(folder / "plans.json", plans)
        write_json(folder / "dataset.json", model.setting.dataset)
        for fold, path in model.checkpoints.items():
            (folder / f"fold_{fold}").mkdir()
            shutil.copyfile(path, folder / f"fold_{fold}" / path.name)


def _row(
    name: str,
    usage: Usage,
    first: Path,
    predicted: Path,
    labelled: Mapping[str, Path],
    cases: Sequence[str],
    model: TrainedModel,
) -> Row:
    ending = model.setting.dataset["file_ending"]
    found = [difference(*(folder / f"{case}{ending}" for folder in (first, predicted))) for case in cases]
    dice = [mean_dice(path, predicted / f"{case}{ending}", model) for case, path in labelled.items()]
    return Row(
        name=name,
        usage=usage,
        equal=1 - sum(f["different"] for f in found) / sum(f["voxels"] for f in found),
        dice=float(np.mean(dice)) if dice else None,
    )


def _write(output: Path, rows: Sequence[Row], chain: Chain, cases: Sequence[str]) -> None:
    content = {"cases": list(cases), "rows": [asdict(row) for row in rows]}
    text = (
        f"# From file to file: {chain.model.trainer}\n\n{len(cases)} images, start-up included, on the CPU; each row a "
        f"process of its own. Memory is that of all its processes at one time.\n\n{table(rows)}\n"
    )
    result = json.dumps(content, indent=2) + "\n"
    write_files(output, {_RESULT: result.encode(), "speed.md": text.encode(), "speed.svg": _figure(rows)})


def table(rows: Sequence[Row]) -> str:
    """Markdown, each row beside the first."""
    base = rows[0].usage.seconds
    header = ["", "seconds", "times as fast", "CPU seconds", "peak memory, GiB", "equal voxels", "Dice"]
    cells = [
        [
            markdown_cell(row.name),
            f"{row.usage.seconds:.1f}",
            f"{base / row.usage.seconds:.2f}",
            f"{row.usage.cpu_seconds:.1f}",
            f"{row.usage.peak_bytes / _GIB:.2f}",
            f"{row.equal:.4%}",
            "" if row.dice is None else f"{row.dice:.4f}",
        ]
        for row in rows
    ]
    return markdown_table(header, cells)


def _figure(rows: Sequence[Row]) -> bytes:
    """Bars: how many times as fast as the first row."""
    base = rows[0].usage.seconds
    values = [base / row.usage.seconds for row in rows]
    with page(0.6 + 0.28 * len(rows)) as figure:
        axis = figure.subplots()
        axis.barh([row.name for row in rows], values, height=0.7, color="#56B4E9", edgecolor="black", linewidth=0.6)
        for index, (row, value) in enumerate(zip(rows, values, strict=True)):
            dice = "" if row.dice is None else f", Dice {row.dice:.3f}"
            text = f"{value:.1f}x, {row.equal:.2%} equal{dice}"
            axis.annotate(text, (value, index), (3, 0), textcoords="offset points", va="center", fontsize=7)
        axis.set_xscale("log")
        axis.set_xlim(min(*values, 1) / 1.3, max(values) * 6)
        axis.set_xlabel(f"times as fast as {rows[0].name}")
        axis.invert_yaxis()
        tidy(axis, "x")
    return rendered(figure, "svg")


def engines_here() -> list[Engine]:
    """Engines that are installed and whose instructions this CPU has, slowest first."""
    try:
        import openvino
    except ImportError:
        return ["onnxruntime"]
    known = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    engines = get_args(Engine)
    return [name for name in engines if not (needs := predict.ENGINES[name]) or needs[0] in known]
