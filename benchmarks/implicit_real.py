"""Sparse compared with dense prediction of a trained Implicit U-Net on real scans.

python benchmarks/implicit_real.py -m MODEL_FOLDER -i IMAGES -ref LABELS --output FOLDER [-chk checkpoint_final.pth]

For each scan: Dice of both against the reference, the refined share, seconds, and how many connected objects of the
dense prediction have no voxel in the sparse one. The model folder is what `nnUNetv2_train` leaves for trainer, plans
and configuration; no image gets into the result.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from reversible import markdown
from scipy import ndimage


def predict(predictor: nnUNetPredictor, image: Any, properties: Any, sparse: bool) -> tuple[Any, float, Any]:
    """Segmentation, seconds, refined share."""
    predictor.network.sparse = sparse
    predictor.network.refined_share(reset=True)
    start = time.perf_counter()
    segmentation = predictor.predict_single_npy_array(image, properties)
    return segmentation, time.perf_counter() - start, predictor.network.refined_share(reset=True)


def dice(a: Any, b: Any) -> float:
    total = a.sum() + b.sum()
    return 1.0 if total == 0 else float(2 * (a & b).sum() / total)


def mean_dice(found: Any, reference: Any, labels: list[int]) -> float:
    return float(np.mean([dice(found == label, reference == label) for label in labels]))


def missed_objects(sparse: Any, dense: Any, labels: list[int]) -> tuple[int, int]:
    """Connected objects of the dense prediction: how many, and how many of them sparse prediction does not touch."""
    objects = missed = 0
    for label in labels:
        components, n = ndimage.label(dense == label, np.ones((3,) * dense.ndim))
        found = set(np.unique(components[sparse == label])) - {0}
        objects, missed = objects + n, missed + n - len(found)
    return objects, missed


def compare(predictor: nnUNetPredictor, image_file: Path, reference_file: Path) -> dict[str, Any]:
    reader = predictor.plans_manager.image_reader_writer_class()
    image, properties = reader.read_images([str(image_file)])
    reference = reader.read_seg(str(reference_file))[0][0]
    labels = predictor.label_manager.foreground_labels
    sparse, sparse_seconds, share = predict(predictor, image, properties, True)
    dense, dense_seconds, _ = predict(predictor, image, properties, False)
    objects, missed = missed_objects(sparse, dense, labels)
    scores = [mean_dice(found, reference, labels) for found in (sparse, dense)]
    return {
        "scan": reference_file.name.split(".")[0],
        "Dice sparse": scores[0],
        "Dice dense": scores[1],
        "difference": scores[0] - scores[1],
        "Dice between": mean_dice(sparse, dense, labels),
        "refined share": share,
        "sparse [s]": sparse_seconds,
        "dense [s]": dense_seconds,
        "objects": objects,
        "missed": missed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", dest="model", type=Path, required=True)
    parser.add_argument("-i", dest="images", type=Path, required=True, help="single-channel images NAME_0000.*")
    parser.add_argument("-ref", dest="references", type=Path, required=True)
    parser.add_argument("-f", dest="fold", type=int, default=0)
    parser.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth")
    parser.add_argument("--mirroring", action="store_true", help="as nnUNetv2_predict does by default")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    predictor = nnUNetPredictor(
        use_mirroring=options.mirroring, perform_everything_on_device=False, device=torch.device("cpu")
    )
    predictor.initialize_from_trained_model_folder(str(options.model), (options.fold,), options.checkpoint)
    ending = predictor.dataset_json["file_ending"]
    rows = []
    for image in sorted(options.images.glob(f"*_0000{ending}")):
        reference = options.references / image.name.replace(f"_0000{ending}", ending)
        if reference.is_file():
            rows.append(compare(predictor, image, reference))
            print(rows[-1], flush=True)
    numbers = [key for key in rows[0] if key != "scan"]
    rows.append({"scan": "mean", **{key: float(np.mean([row[key] for row in rows])) for key in numbers}})
    options.output.mkdir(parents=True, exist_ok=True)
    name = f"{options.model.name.split('__')[0]}-sparse-dense"
    (options.output / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n")
    text = f"# Sparse and dense prediction of {options.model.name}, fold {options.fold}, {options.checkpoint}\n\n"
    (options.output / f"{name}.md").write_text(text + markdown(rows) + "\n")


if __name__ == "__main__":
    main()
