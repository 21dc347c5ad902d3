"""What each step from the trained ensemble to the shipped folder saves: whole predictions, from file to file.

Every row is a process of its own, started as a user does: nnU-Net's command, or `predict.py` of an exported folder.
"""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from nnunet_ext import extras
from nnunet_ext.architectures.deployed import NothingToFuseError, fused
from nnunet_ext.deploy.folder import check_new, write_json
from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.deploy.ship import DeployOptions, ship
from nnunet_ext.deploy.standalone import predict
from nnunet_ext.deploy.standalone.description import check_supported
from nnunet_ext.deploy.standalone.export import Engine, ExportOptions, export
from nnunet_ext.deploy.standalone.parity import cases_of, difference, mean_dice, references_of, threads_of_environment
from nnunet_ext.deploy.watched import Usage, run
from nnunet_ext.escaping import markdown_cell, markdown_table
from nnunet_ext.files import whole_folder
from nnunet_ext.style import page, rendered, tidy

_NNUNET = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as main; main()"
_TORCH_RESAMPLING = {"is_seg": False, "force_separate_z": None, "memefficient_seg_resampling": False}
_GIB = 2**30


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
        student: A smaller trained model of the same data; None: one fold of `model` ends the chain.
    """

    model: TrainedModel
    images: Path
    references: Path | None
    engines: Sequence[Engine]
    student: TrainedModel | None = None

    @property
    def options(self) -> ExportOptions:
        """How models are exported; they are compared here, not there."""
        return ExportOptions(engines=self.engines, calibration=self.images)

    def check(self) -> None:
        """See that nothing is missing, before hours are spent.

        nnU-Net reads checkpoints as pickles, which can run anything: each is read without that first.

        Raises:
            UsageError: names what.
        """
        extras.need("report", "--report")
        self.options.check()
        for model in filter(None, (self.model, self.student)):
            check_supported(model.setting)
            for fold in model.checkpoints:
                model.weights(fold)


def report(chain: Chain, output: Path, show: Callable[[str], None] = lambda what: None) -> tuple[Row, ...]:
    """Measure each step alone and all together; write speed.md, speed.json and speed.svg.

    Raises:
        UsageError: `output` exists, a prediction fails, an engine is missing.
    """
    check_new(output)
    chain.check()
    ending = str(chain.model.setting.dataset["file_ending"])
    cases = list(cases_of(chain.images, ending))
    labelled = references_of(chain.references, cases, ending)
    with whole_folder(output) as folder, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        work = Path(temporary)
        rows: list[Row] = []
        for step in _steps(chain, work, show):
            show(step.name)
            predicted = work / f"predicted-{len(rows)}"
            usage = run([*step.command, "-i", str(chain.images), "-o", str(predicted)], step.name)
            rows.append(_row(step.name, usage, work / "predicted-0", predicted, cases, labelled, chain.model))
        _write(folder, tuple(rows), chain, cases)
    return tuple(rows)


def _steps(chain: Chain, work: Path, show: Callable[[str], None]) -> Iterable[Step]:
    """How nnU-Net predicts; each factor alone; the chain."""
    model, folds = chain.model, list(chain.model.checkpoints)
    ensemble = f"{len(folds)} folds" if len(folds) > 1 else "one fold"
    yield Step(name=f"nnU-Net: {ensemble}, mirroring", command=_nnunet(model.folder, folds, model))
    if len(folds) > 1:
        yield Step(name="one fold", command=_nnunet(model.folder, folds[:1], model))
    yield Step(name="no mirroring", command=(*_nnunet(model.folder, folds, model), "--disable_tta"))
    yield Step(name="step 0.75", command=(*_nnunet(model.folder, folds, model), "-step_size", "0.75"))
    resampled = _with_torch_resampling(model, work / "resampled")
    yield Step(name="torch resampling", command=_nnunet(resampled, folds, model))
    if _fuses(model):
        show("fusing")
        ship(model, work / "fused", DeployOptions())
        yield Step(name="fused", command=_nnunet(work / "fused", folds, model, "checkpoint_final.pth"))
    show("exporting")
    export(model, work / "exported", chain.options, show)
    for engine in chain.engines:
        yield Step(name=f"predict.py, {engine}", command=_alone(work / "exported", engine))
    last = chain.engines[-1]
    small, name = work / "exported", "one fold"
    if chain.student is not None:
        show("exporting the student")
        small, name = work / "student", f"{chain.student.trainer}, one fold"
        export(chain.student, small, chain.options, show)
    first = next(iter((chain.student or model).checkpoints))
    yield Step(name=f"{name}, no mirroring, {last}", command=(*_alone(small, last), "-f", first, "--disable_tta"))


def _nnunet(folder: Path, folds: Sequence[str], model: TrainedModel, checkpoint: str | None = None) -> tuple[str, ...]:
    name = checkpoint or next(iter(model.checkpoints.values())).name
    return (sys.executable, "-c", _NNUNET, "-m", str(folder), "-f", *folds, "-chk", name, "-device", "cpu")


def _alone(folder: Path, engine: str) -> tuple[str, ...]:
    return (sys.executable, str(folder / "predict.py"), "--engine", engine, "--threads", threads_of_environment())


def _fuses(model: TrainedModel) -> bool:
    try:
        fused(model.trained_network(next(iter(model.checkpoints))))
    except NothingToFuseError:
        return False
    return True


def _with_torch_resampling(model: TrainedModel, folder: Path) -> Path:
    """The model with nnU-Net's own faster resampling of logits."""
    plans = copy.deepcopy(dict(model.setting.plans))
    configuration = plans["configurations"][model.setting.configuration]
    configuration["resampling_fn_probabilities"] = "resample_torch_fornnunet"
    configuration["resampling_fn_probabilities_kwargs"] = _TORCH_RESAMPLING
    folder.mkdir()
    write_json(folder / "plans.json", plans)
    write_json(folder / "dataset.json", model.setting.dataset)
    for fold, path in model.checkpoints.items():
        (folder / f"fold_{fold}").mkdir()
        shutil.copyfile(path, folder / f"fold_{fold}" / path.name)
    return folder


def _row(
    name: str,
    usage: Usage,
    first: Path,
    predicted: Path,
    cases: Sequence[str],
    labelled: Mapping[str, Path],
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


def _write(folder: Path, rows: tuple[Row, ...], chain: Chain, cases: Sequence[str]) -> None:
    write_json(folder / "speed.json", {"cases": list(cases), "rows": [asdict(row) for row in rows]})
    text = (
        f"# From file to file: {chain.model.trainer}\n\n{len(cases)} images, start-up included, on the CPU; each row a "
        "process of its own. Memory is that of all its processes at one time.\n\n"
    )
    (folder / "speed.md").write_text(f"{text}{table(rows)}\n", encoding="utf-8")
    (folder / "speed.svg").write_bytes(_figure(rows))


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
