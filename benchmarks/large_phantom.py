"""A CT-like scan of 512x512x300 voxels and ten coarser ones to train on, for `nnunet-ext deploy --report`.

python benchmarks/large_phantom.py --output FOLDER

writes FOLDER/Dataset991_CTPhantomFine (1.6 mm, nnU-Net's raw format), FOLDER/images and FOLDER/labels (one scan, 0.36
to 0.52 mm). Takes some minutes and many GB of memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from nnunet_ext.demo.phantom import AIR, PhantomSpec, make_case, write_dataset

SHAPE = (300, 512, 512)  # z, y, x
UNSEEN = 50  # number of the scan; those to train on are 0 to 9


def fitted(volume: NDArray[np.generic], fill: float) -> NDArray[np.generic]:
    """Cut or fill up a volume around its middle, to `SHAPE`."""
    missing = [max(0, n - m) for n, m in zip(SHAPE, volume.shape, strict=True)]
    padded = np.pad(volume, [(m // 2, m - m // 2) for m in missing], constant_values=fill)
    return padded[tuple(slice((m - n) // 2, (m - n) // 2 + n) for n, m in zip(SHAPE, padded.shape, strict=True))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    output = parser.parse_args().output
    write_dataset(output / "Dataset991_CTPhantomFine", PhantomSpec(n_training=10, n_test=0, spacing=(1.6, 1.6, 1.6)))
    scan = make_case(PhantomSpec(spacing=(0.47, 0.37, 0.51)), UNSEEN)
    files = {"images/ct_0000.nii.gz": fitted(scan.image, AIR), "labels/ct.nii.gz": fitted(scan.labels, 0)}
    for name, volume in files.items():
        (output / name).parent.mkdir(exist_ok=True)
        image = sitk.GetImageFromArray(volume)
        image.SetSpacing(scan.spacing)
        sitk.WriteImage(image, str(output / name), True)


if __name__ == "__main__":
    main()
