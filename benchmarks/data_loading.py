"""What nnU-Net's data loader costs for one image: bytes on the disk, CPU seconds of reading and of augmentation.

python benchmarks/data_loading.py --image images/ct_0000.nii.gz --labels labels/ct.nii.gz [--patch 128 128 128]

Stores the image, normalised and not resampled, as nnU-Net's preprocessing does, then draws batches with nnU-Net's own
loader and augmentation on one thread, as one of its worker processes does: first patches alone, then augmented ones.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from numpy.typing import NDArray

BATCH, STAGES = 2, 6
PER_CLASS = 10_000  # voxels of a label whose places nnU-Net keeps


def store(image: NDArray[np.float32], labels: NDArray[np.int8], patch: tuple[int, ...], folder: Path) -> dict[str, int]:
    """Write a case and return the bytes of its files."""
    data, seg = ((image - image.mean()) / image.std())[None], labels[None]
    places = {int(label): np.argwhere(seg == label)[::100][:PER_CLASS] for label in np.unique(seg) if label}
    arguments: dict[str, Any] = {}
    for name, array in {"": data, "_seg": seg}.items():
        blocks, chunks = comp_blosc2_params(array.shape, patch, array.itemsize)
        arguments |= {f"blocks{name}": blocks, f"chunks{name}": chunks}
    nnUNetDatasetBlosc2.save_case(data, seg, {"class_locations": places}, str(folder / "case"), **arguments)
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def loader(folder: Path, patch: tuple[int, ...], n_labels: int, is_augmented: bool) -> tuple[nnUNetDataLoader, Any]:
    """Batches of a training, and the size of the patches that are read for them."""
    trainer = SimpleNamespace(
        configuration_manager=SimpleNamespace(patch_size=patch), print_to_log_file=lambda *_, **__: None
    )
    rotation, dummy_2d, read, mirror = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(trainer)
    scales = [[0.5**stage] * len(patch) for stage in range(STAGES - 1)]
    augment = nnUNetTrainer.get_training_transforms(
        patch, rotation, scales, mirror, dummy_2d, use_mask_for_norm=[False]
    )
    names = SimpleNamespace(all_labels=list(range(n_labels)), has_ignore_label=False)
    data = nnUNetDatasetBlosc2(str(folder))
    return nnUNetDataLoader(data, BATCH, read, patch, names, 0.33, transforms=augment if is_augmented else None), read


def seconds(batches: Iterable[Any], number: int) -> list[float]:
    """CPU seconds of each batch but the first."""
    found = []
    iterator = iter(batches)
    for _ in range(number + 1):
        begin = time.process_time()
        next(iterator)
        found.append(time.process_time() - begin)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--patch", type=int, nargs=3, default=(128, 128, 128))
    parser.add_argument("--batches", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    np.random.seed(0)
    torch.manual_seed(0)
    patch = tuple(args.patch)
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(args.image))).astype(np.float32)
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(args.labels))).astype(np.int8)
    print(f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}, batch {BATCH}")
    with tempfile.TemporaryDirectory() as folder:
        sizes = store(image, labels, patch, Path(folder))
        per_voxel = (sizes["case.b2nd"] + sizes["case_seg.b2nd"]) / image.size
        print(
            f"image {'x'.join(map(str, image.shape))}: {sum(sizes.values()) / 1e6:.1f} MB in {len(sizes)} files, "
            f"{per_voxel:.2f} bytes per voxel"
        )
        for name, is_augmented in {"read": False, "read and augmented": True}.items():
            batches, read = loader(Path(folder), patch, int(labels.max()) + 1, is_augmented)
            found = seconds(batches, args.batches)
            print(
                f"{name}: mean {sum(found) / len(found):.2f}, median {median(found):.2f}, {min(found):.2f} to "
                f"{max(found):.2f} CPU seconds per batch of {len(found)}"
            )
        volume = BATCH * float(np.prod(np.minimum(read, image.shape)))
        print(
            f"patches of {'x'.join(map(str, read))} are read for {'x'.join(map(str, patch))}: at most "
            f"{volume * per_voxel / 1e6:.1f} MB per batch, as stored (computed)"
        )


if __name__ == "__main__":
    main()
