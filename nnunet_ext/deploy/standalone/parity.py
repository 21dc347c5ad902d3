"""An exported model beside nnU-Net's own prediction, from file to file and voxel by voxel."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
    """One image, predicted by both.

    Args:
        case: Name.
        voxels: Number of them.
        different: Number whose label is another one.
        dice: Lowest Dice of one label between both; 1 where neither finds anything.
        nnunet_seconds: Time of nnU-Net, from file to file, in this process with its model loaded.
        seconds: Time of predict.py, from file to file.
    """

    case: str
    voxels: int
    different: int
    dice: float
    nnunet_seconds: float
    seconds: float


def compare(
    folder: Path, model: TrainedModel, images: Path, show: Callable[[str], None] = lambda what: None
) -> tuple[CaseParity, ...]:
    """Predict all images with an exported folder, in a process of its own, and with nnU-Net; compare the labels.

    Args:
        folder: Exported.
        model: What it was made from.
        images: Folder of images in nnU-Net's format.
        show: Called before each piece of work.

    Raises:
        UsageError: an image can't be predicted.
    """
    content = predict.read_model(folder)
    ending = content["file_ending"]
    try:
        cases = predict.find_cases(images, ending)
    except predict.PredictionError as error:
        raise UsageError(str(error)) from error
    found = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        output = Path(temporary) / "standalone"
        show(f"predicting {len(cases)} images with the exported folder")
        seconds = _run(folder, images, output)
        predictor = nnunet_predictor(model)
        for case, files in cases.items():
            show(f"predicting {case} with nnU-Net")
            start = time.perf_counter()
            target = Path(temporary) / f"{case}{ending}"
            write_nnunet_prediction(predictor, files, target, content["postprocessing"])
            spent = time.perf_counter() - start
            pair = [predict.channels_of(predict.read_file(file)) for file in (target, output / target.name)]
            found.append(_parity(case, pair, nnunet_seconds=spent, seconds=seconds[case]))
    return tuple(found)


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


def _run(folder: Path, images: Path, output: Path) -> dict[str, float]:
    """Run predict.py of the folder as a user does; return seconds of each case."""
    command = [sys.executable, str(folder / "predict.py"), "-i", str(images), "-o", str(output)]
    threads = os.environ.get("OMP_NUM_THREADS", "0")
    done = subprocess.run([*command, "--threads", threads], capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"the exported folder can't predict {images}: {done.stderr.strip().splitlines()[-1]}")
    rows = (line.rsplit("  ", 2) for line in done.stdout.splitlines())
    ending = predict.read_model(folder)["file_ending"]
    return {Path(file).name.removesuffix(ending): float(taken.split()[0]) for _, file, taken in rows}


def _parity(case: str, pair: Sequence[Any], *, nnunet_seconds: float, seconds: float) -> CaseParity:
    theirs, ours = pair
    labels = {*np.unique(theirs), *np.unique(ours)} - {0}
    return CaseParity(
        case=case,
        voxels=theirs.size,
        different=int((theirs != ours).sum()),
        dice=min((_dice(theirs == label, ours == label) for label in labels), default=1.0),
        nnunet_seconds=nnunet_seconds,
        seconds=seconds,
    )


def _dice(a: Any, b: Any) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))
