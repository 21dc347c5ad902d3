"""Sparse prediction of the Implicit U-Net held against dense prediction of the same weights, on validation cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, region_or_label_to_mask
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from scipy import ndimage

if TYPE_CHECKING:
    from nnunet_ext.architectures.implicit_unet import ImplicitUNet
    from nnunet_ext.protocols import HostTrainer

TOLERANCE = 0.002  # of the mean Dice


@dataclass(frozen=True, kw_only=True)
class DenseCheck:
    """What sparse prediction loses.

    Args:
        cases: Number of cases that were compared.
        difference: Mean Dice of sparse prediction minus that of dense prediction.
        objects: Connected objects of dense prediction.
        missed: How many of them have no voxel of the same label (region) in sparse prediction.
    """

    cases: int
    difference: float
    objects: int
    missed: int

    def lines(self) -> list[str]:
        """Give the lines of the log, with a warning where the Dice differs by more than 0.002."""
        found = (
            f"sparse minus dense prediction of {self.cases} validation cases: mean Dice {self.difference:+.4f}, "
            f"{self.missed} of {self.objects} objects missed"
        )
        if abs(self.difference) <= TOLERANCE:
            return [found]
        cure = 'set "second_look": 1.0 or "sparse": false in arch_kwargs of plans.json in the model folder'
        return [found, f"WARNING: sparse and dense prediction must not differ by more than {TOLERANCE} Dice: {cure}."]


def check_against_dense(trainer: HostTrainer, network: ImplicitUNet, cases: Sequence[str]) -> DenseCheck:
    """Predict cases densely, as nnU-Net's validation predicts, and compare with what the validation wrote.

    Args:
        trainer: Trainer whose validation is done.
        network: Its network without wrappers, which would wait for other ranks.
        cases: Validation cases.
    """
    manager, reader = trainer.label_manager, trainer.plans_manager.image_reader_writer_class()
    labels = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    ending = trainer.dataset_json["file_ending"]
    dice: list[tuple[float, float]] = []
    objects = missed = 0
    with TemporaryDirectory() as folder:
        for case in cases:
            write_dense_prediction(trainer, network, case, Path(folder) / case)
            reference = Path(trainer.preprocessed_dataset_folder_base, "gt_segmentations", case + ending)
            files = [Path(trainer.output_folder, "validation", case + ending), Path(folder, case + ending)]
            metrics = [
                compute_metrics(str(reference), str(file), reader, labels, manager.ignore_label)["metrics"]
                for file in files
            ]
            sparse, dense = (reader.read_seg(str(file))[0] for file in files)
            for label in labels:
                dice.append((metrics[0][label]["Dice"], metrics[1][label]["Dice"]))
                found, lost = missed_objects(*(region_or_label_to_mask(s, label)[0] for s in (sparse, dense)))
                objects, missed = objects + found, missed + lost
    return DenseCheck(cases=len(cases), difference=mean_difference(np.array(dice)), objects=objects, missed=missed)


def mean_difference(dice: Any) -> float:
    """Mean of the first minus the second column; NaN, a label that neither prediction nor reference has, counts as 1.

    Shape: (n, 2); rows of NaN alone do not count.
    """
    told = dice[~np.isnan(dice).all(1)]
    return float((np.nan_to_num(told, nan=1.0) @ [1, -1]).mean()) if len(told) else 0.0


def missed_objects(sparse: Any, dense: Any) -> tuple[int, int]:
    """Count the connected objects of one mask, and those that the other does not touch.

    Shape: both (x, y, z).
    """
    components, n = ndimage.label(dense, np.ones((3,) * dense.ndim))
    return n, n - len(np.setdiff1d(components[sparse], 0))


def write_dense_prediction(trainer: HostTrainer, network: ImplicitUNet, case: str, file: Path) -> None:
    """Predict one preprocessed case with every voxel decoded, as `perform_actual_validation` does."""
    predictor = nnUNetPredictor(device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    dataset = trainer.dataset_class(
        trainer.preprocessed_dataset_folder,
        [case],
        folder_with_segs_from_previous_stage=trainer.folder_with_segs_from_previous_stage,
    )
    data, _, previous, properties = dataset.load_case(case)
    data = data[:]
    if trainer.is_cascaded:
        prior = convert_labelmap_to_one_hot(previous[:], trainer.label_manager.foreground_labels, data.dtype)
        data = np.concatenate((data, prior))
    was_sparse, network.sparse = network.sparse, False
    try:
        logits = predictor.predict_sliding_window_return_logits(torch.tensor(data)).cpu()
    finally:
        network.sparse = was_sparse
    export_prediction_from_logits(
        logits, properties, trainer.configuration_manager, trainer.plans_manager, trainer.dataset_json, str(file)
    )
