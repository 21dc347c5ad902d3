"""An exported model beside nnU-Net's own prediction, from file to file and voxel by voxel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.deploy.standalone import predict
from nnunet_ext.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class CaseParity:
    """One image, predicted by nnU-Net and by an engine of the exported folder.

    Args:
        engine: A key of `predict.ENGINES`.
        case: Name.
        voxels: Number of them.
        different: Number whose label is another one.
        dice: Lowest Dice of one label between both; 1 where neither finds anything.
        nnunet_seconds: Time of nnU-Net, from file to file, with its model loaded.
        seconds: The same of predict.py.
        nnunet_accuracy, accuracy: Mean Dice of both against the reference, without structures that neither it nor the
            prediction has; None without a reference.
    """

    engine: str
    case: str
    voxels: int
    different: int
    dice: float
    nnunet_seconds: float
    seconds: float
    nnunet_accuracy: float | None = None
    accuracy: float | None = None


def compare(
    folder: Path,
    model: TrainedModel,
    images: Path,
    *,
    engines: Sequence[str] = ("onnxruntime",),
    references: Path | None = None,
    show: Callable[[str], None] = lambda what: None,
) -> tuple[CaseParity, ...]:
    """Predict all images with an exported folder, in a process of its own, and with nnU-Net; compare the labels.

    Args:
        folder: Exported.
        model: What it was made from.
        images: Folder of images in nnU-Net's format.
        engines: To predict with, one after the other.
        references: Folder of segmentations CASE.nii.gz; None: there are none.
        show: Called before each piece of work.

    Raises:
        UsageError: an image can't be predicted, a reference is missing, this machine lacks an engine.
    """
    content = predict.read_model(folder)
    ending = content["file_ending"]
    cases = cases_of(images, ending)
    labelled = references_of(references, cases, ending)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        outputs, seconds = {}, {}
        for engine in engines:
            show(f"predicting {len(cases)} images with the exported folder, {engine}")
            outputs[engine] = Path(temporary) / engine
            seconds[engine] = _run(folder, images, outputs[engine], engine)
        predictor, found = nnunet_predictor(model), []
        for case, files in cases.items():
            show(f"predicting {case} with nnU-Net")
            start = time.perf_counter()
            target = Path(temporary) / f"{case}{ending}"
            write_nnunet_prediction(predictor, files, target, content["postprocessing"])
            spent = time.perf_counter() - start
            for engine, output in outputs.items():
                ours = output / target.name
                scores = [mean_dice(labelled[case], file, model) for file in (target, ours)] if labelled else [None] * 2
                found.append(
                    CaseParity(
                        engine=engine,
                        case=case,
                        **difference(target, ours),
                        nnunet_seconds=spent,
                        seconds=seconds[engine][case],
                        nnunet_accuracy=scores[0],
                        accuracy=scores[1],
                    )
                )
    return tuple(found)


def cases_of(images: Path, ending: str) -> dict[str, list[Path]]:
    """Files of each case.

    Raises:
        UsageError: there is none.
    """
    try:
        return predict.find_cases(images, ending)
    except predict.PredictionError as error:
        raise UsageError(str(error)) from error


def threads_of_environment() -> str:
    """Threads that the environment allows one process, "0" where it says nothing."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return wanted if wanted.isdecimal() else "0"


def references_of(folder: Path | None, cases: Iterable[str], ending: str) -> dict[str, Path]:
    """Segmentation of each case; nothing without a folder.

    Raises:
        UsageError: one is missing.
    """
    if folder is None:
        return {}
    found = {case: folder / f"{case}{ending}" for case in cases}
    for path in found.values():
        if not path.is_file():
            raise UsageError(f"-ref needs a segmentation of each image of -i, {path} is missing: add it, or omit -ref.")
    return found


def nnunet_predictor(model: TrainedModel) -> Any:
    """nnU-Net's predictor with all folds of a trained model on the CPU, as `nnUNetv2_predict` makes it."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    setting = model.setting
    predictor.manual_initialization(
        model.network(),
        setting.plans_manager,
        setting.configuration_manager,
        [model.weights(fold) for fold in model.checkpoints],
        dict(setting.dataset),
        model.trainer,
        model.mirroring_axes,
    )
    return predictor


def write_nnunet_prediction(
    predictor: Any, files: Sequence[Path], target: Path, rules: Sequence[Mapping[str, Any]]
) -> None:
    """Predict one case by nnU-Net's own preprocessing, sliding window, export and postprocessing."""
    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.postprocessing import remove_connected_components as nnunet

    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case(
        [str(file) for file in files], None, plans, configuration, predictor.dataset_json
    )
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data).float())
    ending = predictor.dataset_json["file_ending"]
    export_prediction_from_logits(
        logits, properties, configuration, plans, predictor.dataset_json, str(target).removesuffix(ending)
    )
    if rules:
        options = [{"labels_or_regions": tuple(r["labels"]), "background_label": r["background"]} for r in rules]
        functions = [nnunet.remove_all_but_largest_component_from_segmentation] * len(rules)
        reader = plans.image_reader_writer_class()
        nnunet.load_postprocess_save(str(target), str(target), reader, functions, options)


def _run(folder: Path, images: Path, output: Path, engine: str) -> dict[str, float]:
    """Run predict.py of the folder as a user does; return seconds of each case."""
    command = [sys.executable, str(folder / "predict.py"), "-i", str(images), "-o", str(output), "--engine", engine]
    command += ["--threads", threads_of_environment()]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UsageError(f"the exported folder can't predict {images} by {engine}: {said[0].removeprefix('error: ')}")
    ending = predict.read_model(folder)["file_ending"]
    rows = (re.fullmatch(r"\d+ of \d+  (.+)  ([\d.]+) s", line) for line in done.stdout.splitlines())
    return {Path(row[1]).name.removesuffix(ending): float(row[2]) for row in rows if row}


def _labels(file: Path) -> Any:
    return predict.channels_of(predict.read_file(file))


def difference(first: Path, second: Path) -> dict[str, Any]:
    """Voxels of two label maps, how many differ, and the lowest Dice of one label; 1 where neither has any."""
    theirs, ours = _labels(first), _labels(second)
    labels = {*np.unique(theirs), *np.unique(ours)} - {0}
    dice = (2 * ((theirs == n) & (ours == n)).sum() / ((theirs == n).sum() + (ours == n).sum()) for n in labels)
    return {"voxels": theirs.size, "different": int((theirs != ours).sum()), "dice": float(min(dice, default=1.0))}


def mean_dice(reference: Path, prediction: Path, model: TrainedModel) -> float:
    """Mean Dice of all structures as nnU-Net evaluates; 1 where neither map has any."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics

    if _labels(reference).shape != _labels(prediction).shape:
        raise UsageError(
            f"-ref needs segmentations on the grid of the images, {reference} has the shape "
            f"{_labels(reference).shape[1:]}, its image {_labels(prediction).shape[1:]}: resample it."
        )
    labels = model.setting.label_manager
    structures = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    reader = model.setting.plans_manager.image_reader_writer_class()
    metrics = compute_metrics(str(reference), str(prediction), reader, structures, labels.ignore_label)["metrics"]
    dice = [float(m["Dice"]) for m in metrics.values() if not np.isnan(m["Dice"])]
    return float(np.mean(dice)) if dice else 1.0
