"""Reads the worst cases with their segmentations, for the overlays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nnunet_ext.comparison.accuracy import MEAN, Evaluation
from nnunet_ext.comparison.compare import Comparison
from nnunet_ext.comparison.overlay import Scan
from nnunet_ext.comparison.scores import structures
from nnunet_ext.comparison.segmentation_scores import read_labels
from nnunet_ext.errors import UsageError
from nnunet_ext.printable import printable
from nnunet_ext.whole import check_whole

_MOST = 4  # cases that are drawn


def scans(comparison: Comparison, evaluation: Evaluation) -> tuple[list[Scan], list[str]]:
    """The worst case of each run, and sentences about those that can't be drawn."""
    found: list[Scan] = []
    reasons: dict[str, list[str]] = {}
    cases = list(dict.fromkeys(worst[0][0] for worst in evaluation.worst.values() if worst))
    for case in cases[:_MOST]:
        try:
            found.append(_scan(comparison, evaluation, case))
        except UsageError as error:
            reasons.setdefault(str(error), []).append(case)
    return found, [f"No picture of worst cases ({', '.join(names)}): {why}" for why, names in reasons.items()]


def _scan(comparison: Comparison, evaluation: Evaluation, case: str) -> Scan:
    dataset = comparison.request.dataset
    ending = str(dataset["file_ending"])
    image_path, reference, predictions = _files(comparison, evaluation, case, ending)
    truth, spacing = read_labels(reference, dataset)
    image = _read_image(image_path, dataset)
    if image.shape != truth.shape:
        raise UsageError(f"{image_path} has the shape {image.shape}, its reference {truth.shape}.")
    dice = evaluation.values("Dice", MEAN).loc[case]
    labels = {}
    for label, path in predictions.items():
        segmentation, _ = read_labels(path, dataset)
        if segmentation.shape != truth.shape:
            raise UsageError(f"{path} has the shape {segmentation.shape}, its reference {truth.shape}.")
        labels[f"{printable(label)}\nDice {dice[label]:.2f}"] = segmentation
    names = {key[0]: name for key, name in structures(dataset["labels"]).items() if len(key) == 1}
    if truth.ndim == 2:  # one slice
        image, truth, spacing = image[None], truth[None], (1.0, *spacing)
        labels = {label: segmentation[None] for label, segmentation in labels.items()}
    is_ct = str(next(iter(dataset.get("channel_names", {"0": ""}).values()))).lower() == "ct"
    z, y, x = spacing
    return Scan(case, image, (z, y, x), truth, labels, names, is_ct)


def _files(
    comparison: Comparison, evaluation: Evaluation, case: str, ending: str
) -> tuple[Path, Path, dict[str, Path]]:
    """Image, reference and predictions of a case."""
    request, places = comparison.request, comparison.request.places
    name = str(request.runs[0].plans.get("dataset_name")) if request.runs else ""
    image = places.image(name, case, ending)
    if evaluation.name == "cross-validation":
        reference = places.reference(name, case, ending)
        own = evaluation.compared[evaluation.compared["case"] == case].set_index("run")["fold"]
        folds = own[~own.index.duplicated()]
        runs = {run.label: run for run in request.runs}
        predictions = {
            label: runs[label].fold_folder(folds[label]) / "validation" / f"{case}{ending}"
            for label in evaluation.labels
        }
    else:
        reference = request.references / f"{case}{ending}" if request.references else None
        predictions = {label: request.predictions[label] / f"{case}{ending}" for label in evaluation.labels}
    wanted = [("its image", image), ("its reference", reference), *predictions.items()]
    for what, path in wanted:
        if path is None or not path.is_file():
            where = " (set nnUNet_raw or give --images)" if path is image else ""
            raise UsageError(f"{what if path is None else path} is missing{where}.")
    if image is None or reference is None:
        raise UsageError("its image or reference is missing.")
    return image, reference, predictions


def _read_image(path: Path, dataset: dict[str, Any]) -> NDArray[Any]:
    """First channel, of the shape that `read_labels` gives."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    try:
        check_whole(path)
        reader = determine_reader_writer_from_dataset_json(dataset, str(path), verbose=False)()
        image: NDArray[Any] = reader.read_images((str(path),))[0][0]
    except Exception as error:  # readers of many formats, each with errors of its own
        raise UsageError(f"{path} can't be read as an image ({error}).") from error
    return image[0] if image.shape[0] == 1 else image
