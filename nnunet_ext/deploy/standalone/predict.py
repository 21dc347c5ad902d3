"""Predict segmentations with an exported nnU-Net model: ONNX Runtime or OpenVINO, no PyTorch and no nnU-Net.

What nnU-Net computes from file to file, for the model in the folder of this file (or -m): read, transpose, crop,
normalise, resample, sliding window with mirroring, mean of the folds, resample back, write. Numbers of the model are in
model.json; all files are checked against SHA256SUMS before they are used.

example: python predict.py -i SCANS -o PREDICTED
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # no file that lies beside this one is taken for a package
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
try:
    import numpy as np
    import SimpleITK as sitk
    from numpy.typing import NDArray
    from scipy import ndimage, sparse
except ImportError as error:
    sys.exit(f"error: predict.py needs NumPy, SciPy and SimpleITK ({error}): pip install -r requirements.txt")

FORMAT, VERSION = "nnU-Net standalone model", 1
# Engine -> what OpenVINO calls its instructions, and the precision that it is asked for.
ENGINES = {
    "onnxruntime": None,
    "openvino": ("FP32", "f32"),
    "openvino-bfloat16": ("BF16", "bf16"),
    "openvino-int8": ("INT8", "bf16"),
}
GIPL_MAGIC = ((719555000).to_bytes(4, "big"), (4026526128).to_bytes(4, "big"))
GIPL_BITS = {1: 1, 7: 8, 8: 8, 15: 16, 16: 16, 31: 32, 32: 32, 64: 32, 65: 64}  # of a voxel, by its kind
GZIP_RATIO = 1100  # more than gzip ever saves
MODEL, CHECKSUMS = "model.json", "SHA256SUMS"
SLAB = 2**20  # voxels that one thread resamples at a time: so many stay in its cache
LEAST_POSITIVE = 1.5 * 2**-24  # logit of a region; of less nnU-Net's sigmoid is 0.5
SIGMA, GAUSSIAN_PEAK = 1 / 8, 10.0  # weights of a window, in patches and at its centre, as in nnU-Net

Array = NDArray[Any]
Network = Callable[[Array], Array]  # (B, C, *patch) -> (B, outputs, *patch), float32


class PredictionError(Exception):
    """What is wrong with the input, in one sentence: rule, value, cure."""


# --- the model -------------------------------------------------------------------------------------------------------


def read_model(folder: Path) -> dict[str, Any]:
    """Read model.json of a complete folder.

    Raises:
        PredictionError: a file is missing, or not the one that was exported.
    """
    again = "copy the folder again from where it was exported"
    listed = read_sums(folder, again)
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file() or sha256(path) != expected:
            raise PredictionError(
                f"{path} must be the file that was exported, it is missing, cut off or changed: {again}."
            )
    model: dict[str, Any] = json.loads((folder / MODEL).read_text(encoding="utf-8")) if MODEL in listed else {}
    if model and (model.get("format"), model.get("version")) != (FORMAT, VERSION):
        raise PredictionError(
            f"{folder / MODEL} must be a {FORMAT} of version {VERSION}, got {model.get('format')} "
            f"{model.get('version')}: use the predict.py that was exported with it."
        )
    used = [MODEL, *(network["file"] for network in model.get("networks", ()))]
    used += sorted(path.name for path in folder.glob("*.int8.*"))
    if unlisted := [name for name in used if name not in listed]:
        raise PredictionError(f"{folder / CHECKSUMS} must list {unlisted[0]}, it is cut off or changed: {again}.")
    return model


def read_sums(folder: Path, cure: str) -> dict[str, str]:
    """Checksum of each file; PredictionError where there are none."""
    try:
        text = (folder / CHECKSUMS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PredictionError(
            f"-m needs the folder of an exported model with {CHECKSUMS}, got {folder}: {cure}."
        ) from error
    pairs = (line.partition("  ") for line in text.splitlines())
    listed = {name: expected for expected, _, name in pairs}
    if outside := [name for name in listed if not name or Path(name).name != name]:
        raise PredictionError(f"{folder / CHECKSUMS} must list files of the folder itself, got {outside[0]!r}: {cure}.")
    return listed


def sha256(path: Path) -> str:
    """Checksum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_network(path: Path, engine: str = "onnxruntime", threads: int = 0, device: str = "cpu") -> Network:
    """Load the ONNX file of a fold, or for openvino-int8 what lies beside it.

    Args:
        path: File.
        engine: A key of `ENGINES`.
        threads: On the CPU; 0: as many as the engine takes.
        device: "cpu"; "cuda" with onnxruntime, which needs the package onnxruntime-gpu.

    Raises:
        PredictionError: this machine lacks the engine, the device or the instructions.
    """
    if engine == "onnxruntime":
        return load_onnxruntime(path, threads, device)
    if device != "cpu":
        raise PredictionError(f"-device {device} needs --engine onnxruntime, got {engine}: use -device cpu.")
    return load_openvino(path, engine, threads)


def load_onnxruntime(path: Path, threads: int, device: str) -> Network:
    """Load for ONNX Runtime; see `load_network`."""
    try:
        import onnxruntime
    except ImportError as error:
        raise PredictionError("--engine onnxruntime needs ONNX Runtime: pip install onnxruntime.") from error
    providers = onnxruntime.get_available_providers()
    wanted = [f"{name}ExecutionProvider" for name in (("CUDA", "CPU") if device == "cuda" else ("CPU",))]
    if wanted[0] not in providers:
        raise PredictionError(
            f"-device {device} needs an ONNX Runtime that has it, this one has {', '.join(providers)}: install "
            "onnxruntime-gpu, or use -device cpu."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
    if session.get_providers()[0] != wanted[0]:
        raise PredictionError(
            f"-device {device} needs a driver that ONNX Runtime can use, it fell back to {session.get_providers()[0]}: "
            "see its message above, or use -device cpu."
        )
    (image,) = session.get_inputs()
    return lambda x: np.asarray(session.run(None, {image.name: x})[0], np.float32)


def load_openvino(path: Path, engine: str, threads: int) -> Network:
    """Load for OpenVINO; see `load_network`."""
    try:
        import openvino
    except ImportError as error:
        raise PredictionError(f"--engine {engine} needs OpenVINO: pip install openvino.") from error
    instructions, precision = ENGINES[engine] or ("", "")
    core = openvino.Core()
    known = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if instructions not in known:
        raise PredictionError(
            f"--engine {engine} needs a CPU with instructions for {instructions}, OpenVINO finds {', '.join(known)}: "
            "use --engine openvino."
        )
    if engine == "openvino-int8":
        path, precision = int8_file(path), precision if "BF16" in known else "f32"
        if not path.is_file():
            raise PredictionError(f"--engine {engine} needs {path.name}: export with --engines {engine} and images.")
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(core.read_model(path), "CPU", options)
    return lambda x: np.array(compiled(x)[0], np.float32)  # a copy: OpenVINO uses its memory again


def int8_file(path: Path) -> Path:
    """The network in int8 of the fold of an ONNX file."""
    return path.with_suffix(".int8.xml")


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Image:
    """One case.

    Args:
        data: Intensities, (C, *spatial), axes as SimpleITK's arrays have them; 2D images have one slice.
        spacing: Millimetres per axis of `data`.
        geometry: Image that says where the voxels lie.
        orientation: That of the file, where the model reads all images in one orientation.
    """

    data: Array
    spacing: tuple[float, ...]
    geometry: sitk.Image
    orientation: str | None


def find_cases(folder: Path, ending: str) -> dict[str, list[Path]]:
    """Files of each case in the order of their channels: CASE_0000, CASE_0001, ...

    Raises:
        PredictionError: there is none.
    """
    pattern = re.compile(rf"(?P<case>[^.].*)_\d{{4}}{re.escape(ending)}")
    cases: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*")):
        if match := pattern.fullmatch(path.name):
            cases.setdefault(match["case"], []).append(path)
    if not cases:
        raise PredictionError(f"-i needs a folder of images CASE_0000{ending}, got {folder}: name them so.")
    return cases


def read_image(files: Sequence[Path], channels: Sequence[str], reader: str) -> Image:
    """Read the channels of a case as nnU-Net's `reader` does.

    Raises:
        PredictionError: a file can't be read, channels are missing or lie on different grids, or are not finite.
    """
    check_numbers(files)
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(read_file, files))
    orientation = None
    if reader.startswith("Nibabel"):
        for file, image in zip(files, images, strict=True):
            check_orientation(file, image)
    if reader.endswith("WithReorient"):
        if wrong := [file for file, image in zip(files, images, strict=True) if image.GetDimension() != 3]:
            raise PredictionError(f"{wrong[0]} must be a 3D image of one channel: give one file for each channel.")
        # nnU-Net writes in that of the last channel.
        orientation = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(images[-1].GetDirection())
        images = [sitk.DICOMOrient(image, "RAS") for image in images]
    check_grids(files, images)
    data = np.concatenate([channels_of(image) for image in images])
    if data.ndim != 4 or len(data) != len(channels):
        raise PredictionError(
            f"{files[0]} must be a 2D or 3D image with the channels {', '.join(channels)}, together its files have "
            f"the shape {data.shape}: give one file CASE_0000, CASE_0001, ... for each channel."
        )
    if not np.isfinite(data).all():
        raise PredictionError(f"{files[0]} must hold finite numbers, it has NaN or infinity: replace them.")
    spacing = tuple(abs(s) for s in reversed(images[0].GetSpacing()))
    if reader == "NaturalImage2DIO":
        spacing = (999.0, 1.0, 1.0)
    elif len(spacing) == 2:  # one slice, so thick that nothing is resampled across it
        spacing = (max(spacing) * 999, *spacing)
    return Image(data=data, spacing=spacing, geometry=images[0], orientation=orientation)


def check_numbers(files: Sequence[Path]) -> None:
    """See that no channel of a case is left out."""
    if [int(re.findall(r"_(\d{4})\.", file.name)[-1]) for file in files] != list(range(len(files))):
        raise PredictionError(
            f"Channels of a case are numbered from 0000 on, {files[0].parent} has {', '.join(f.name for f in files)}: "
            "add what is missing."
        )


def check_grids(files: Sequence[Path], images: Sequence[sitk.Image]) -> None:
    """See that the channels of a case lie on one grid."""
    first = images[0]
    for file, image in zip(files, images, strict=True):
        if image.GetSize() != first.GetSize() or not np.allclose(image.GetSpacing(), first.GetSpacing()):
            raise PredictionError(
                f"All channels of a case need one grid, {file} has {image.GetSize()} voxels of {image.GetSpacing()} "
                f"mm, {files[0].name} {first.GetSize()} of {first.GetSpacing()}: resample it."
            )


def check_orientation(file: Path, image: sitk.Image) -> None:
    """See that a NIfTI file says where its voxels lie: where it does not, Nibabel and ITK assume different things."""
    if image.HasMetaDataKey("qform_code") and image.HasMetaDataKey("sform_code"):
        codes = [image.GetMetaData(key).strip() for key in ("qform_code", "sform_code")]
        if codes == ["0", "0"]:
            raise PredictionError(
                f"{file} must say how the body lies in it, both qform_code and sform_code are 0: set them as in the "
                "training images."
            )


def read_file(file: Path) -> sitk.Image:
    """Read one file; PredictionError where it is no complete image."""
    try:
        str(file).encode()  # SimpleITK ends the whole program at names that are not UTF-8
        check_length(file)
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(check_gzip, file)  # meanwhile; what it finds is told first
            try:
                return sitk.ReadImage(str(file))
            finally:
                whole.result()
    except UnicodeEncodeError as error:
        raise PredictionError(f"{str(file)!a} must have a name in UTF-8: rename it.") from error
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise PredictionError(f"{file} must be a complete image, it can't be read to its end: replace it.") from error
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise PredictionError(
            f"{file} must be a complete image, SimpleITK can't read it ({reason}): replace it."
        ) from error


def check_length(file: Path) -> None:
    """Raise EOFError for a file that was cut off, where ITK fills it up without a word: NIfTI, GIPL, BMP.

    Of a gzip file this is what its header promises beside what it can hold; see `check_gzip`.
    """
    with file.open("rb") as plain:
        is_gzip = plain.read(2) == b"\x1f\x8b"
    with gzip.open(file) if is_gzip else file.open("rb") as stream:
        header = stream.read(352)
    if header[:4] == b"\x89PNG" and header[24] < 8:
        raise PredictionError(f"{file} must have 8 or 16 bits per channel, it has {header[24]}: convert it.")
    if length(header) > file.stat().st_size * (GZIP_RATIO if is_gzip else 1):
        raise EOFError


def check_gzip(file: Path) -> None:
    """Raise EOFError for a gzip file that ends early, or holds less than its header promises."""
    with file.open("rb") as plain:
        if plain.read(2) != b"\x1f\x8b":
            return
    with gzip.open(file) as stream:
        header = stream.read(352)
        size = len(header)
        while block := stream.read(1 << 24):
            size += len(block)
    if size < length(header):
        raise EOFError


def length(header: bytes) -> int:
    """Bytes that a file has by its header; 0 where it does not say."""
    if header[344:347] == b"n+1":
        order = "<" if header[:4] == (348).to_bytes(4, "little") else ">"
        axes, *shape = struct.unpack(f"{order}8h", header[40:56])
        (bits,) = struct.unpack(f"{order}h", header[72:74])
        (offset,) = struct.unpack(f"{order}f", header[108:112])
        return int(offset) + math.prod(shape[:axes]) * bits // 8
    if header[:2] == b"BM":
        return int.from_bytes(header[2:6], "little")
    if header[252:256] in GIPL_MAGIC:
        *shape, kind = struct.unpack(">5H", header[:10])
        return 256 + math.prod(max(1, n) for n in shape) * GIPL_BITS.get(kind, 0) // 8
    return 0


def channels_of(image: sitk.Image) -> Array:
    """Intensities as (C, *spatial) of float32."""
    array = sitk.GetArrayViewFromImage(image).astype(np.float32)
    array = np.moveaxis(array, -1, 0) if image.GetNumberOfComponentsPerPixel() > 1 else array[None]
    return array[:, None] if image.GetDimension() == 2 else array


def write_segmentation(labels: Array, image: Image, file: Path) -> None:
    """Write labels on the grid of the image; the file is complete or not there."""
    labels = labels.astype(np.uint8 if labels.max() < 255 else np.uint16)
    result = sitk.GetImageFromArray(labels[0] if image.geometry.GetDimension() == 2 else labels)
    result.CopyInformation(image.geometry)
    if image.orientation is not None:
        result = sitk.DICOMOrient(result, image.orientation)
    part = file.with_name(f".part-{file.name}")
    try:
        sitk.WriteImage(result, str(part), True)
        os.replace(part, file)
    except (RuntimeError, OSError) as error:
        raise PredictionError(f"{file} can't be written ({error}): free space on the disk.") from error
    finally:
        part.unlink(missing_ok=True)


# --- preprocessing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the network sees of a case, and how to come back.

    Args:
        data: (C, *spatial), axes and spacing of the model.
        spacing: Its spacing.
        original_spacing: That of the image, in the same order of axes.
        shape: Voxels of the image, in the same order.
        box: Where the part that is not zero lies in it.
    """

    data: Array
    spacing: tuple[float, ...]
    original_spacing: tuple[float, ...]
    shape: tuple[int, ...]
    box: tuple[slice, ...]


def prepare(image: Image, model: Mapping[str, Any], threads: int = 0) -> Prepared:
    """Transpose, crop to what is not zero, normalise, resample."""
    axes = model["transpose_forward"]
    data = image.data.transpose(0, *(axis + 1 for axis in axes))
    original = tuple(image.spacing[axis] for axis in axes)
    spacing = (*original[: len(original) - len(model["spacing"])], *model["spacing"])  # 2D: slices stay as they are
    shape = data.shape[1:]
    nonzero = (data != 0).any(0)
    box = bounding_box(nonzero)
    if any(scheme["use_mask"] for scheme in model["normalization"]):
        nonzero = ndimage.binary_fill_holes(nonzero)
    data = data[all_channels(box)]
    normalized = [
        normalize(channel, scheme, nonzero[box]) for channel, scheme in zip(data, model["normalization"], strict=True)
    ]
    size = [round(a / b * n) for a, b, n in zip(original, spacing, data.shape[1:], strict=True)]
    if min(size) < 1:
        raise PredictionError(
            f"Images need at least one voxel of {spacing} mm along each axis, this one has {data.shape[1:]} voxels of "
            f"{original} mm: check its spacing."
        )
    resampling = Resampling.of(data.shape[1:], size, original, spacing, model["resampling"]["data"])
    data = np.empty((len(normalized), *size), np.float32)

    limits = [resampling.limits(channel) for channel in normalized]

    def fill(rows: slice) -> None:
        for target, channel, between in zip(data, normalized, limits, strict=True):
            resampling.rows_of(target, rows)[:] = resampling.part(channel, between, rows)

    in_parallel(fill, resampling.slabs(threads), threads)
    return Prepared(data=data, spacing=spacing, original_spacing=original, shape=shape, box=box)


def bounding_box(mask: Array) -> tuple[slice, ...]:
    """Smallest box that holds all of a mask; everything where it is empty."""
    return ndimage.find_objects(mask.astype(np.uint8))[0] if mask.any() else tuple(slice(0, n) for n in mask.shape)


def all_channels(part: Sequence[Any]) -> tuple[Any, ...]:
    """Index of a part of space in all channels."""
    return (slice(None), *part)


def normalize(channel: Array, scheme: Mapping[str, Any], mask: Array) -> Array:
    """Normalise one channel by nnU-Net's scheme of this name; `mask` is what is not zero."""
    channel, name = channel.copy(), scheme["scheme"]
    if name == "ZScoreNormalization":
        inside: Any = mask if scheme["use_mask"] else ...
        values = channel[inside]
        channel[inside] = (values - values.mean()) / max(values.std(), 1e-8)
    elif name == "CTNormalization":
        np.clip(channel, scheme["percentile_00_5"], scheme["percentile_99_5"], out=channel)
        channel -= scheme["mean"]
        channel /= max(scheme["std"], 1e-8)
    elif name == "RescaleTo01Normalization":
        channel -= channel.min()
        channel /= max(channel.max(), 1e-8)
    elif name == "RGBTo01Normalization":
        if channel.min() < 0 or channel.max() > 255:
            raise PredictionError(
                f"Colours must be from 0 to 255, got {channel.min():g} to {channel.max():g}: give RGB images of 8 bits."
            )
        channel /= 255
    elif name != "NoNormalization":
        raise PredictionError(f"{MODEL} must name a normalisation of nnU-Net, got {name}: export the model again.")
    return channel


# --- resampling ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How a channel is resampled as nnU-Net does it, axis by axis and slab by slab.

    A spline on a grid is the product of one along each axis: the volume is multiplied by a matrix for each.

    Args:
        size: Voxels of the result.
        steps: Axes and their matrices, those that shrink first; None leaves an axis as it is.
        alone: The axis that is resampled after all others, for itself, and its matrix.
        clips: Whether the result stays between the least and the largest value, since splines overshoot.
    """

    size: tuple[int, ...]
    steps: tuple[tuple[int, Any], ...]
    alone: tuple[int, Any] | None
    clips: bool

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        size: Sequence[int],
        spacing: Sequence[float],
        new_spacing: Sequence[float],
        how: Mapping[str, Any],
    ) -> Resampling:
        """From `shape` to `size`."""
        axis = separate_axis(spacing, new_spacing, how["force_separate_z"], how["separate_z_anisotropy_threshold"])
        together = sorted((a for a in range(len(size)) if a != axis), key=lambda a: size[a] / shape[a])
        alone = None
        if axis is not None:
            order = "nearest-exact" if how["function"] == "resample_torch_fornnunet" else how["order_z"]
            alone = (axis, weights(shape[axis], size[axis], order))
        return cls(
            size=tuple(size),
            steps=tuple((a, weights(shape[a], size[a], how["order"])) for a in together),
            alone=alone,
            clips=how["order"] > 1 and tuple(shape) != tuple(size),
        )

    def slabs(self, threads: int) -> list[slice]:
        """Rows of the result, along the axis of the first step, that are resampled together."""
        rows = self.size[self.steps[0][0]]
        some = max(1, min(SLAB * rows // math.prod(self.size), -(-rows // processors(threads))))
        return [slice(start, min(start + some, rows)) for start in range(0, rows, some)]

    def rows_of(self, result: Array, rows: slice) -> Array:
        """That part of an array of the size of the result."""
        return np.moveaxis(np.moveaxis(result, self.steps[0][0], 0)[rows], 0, self.steps[0][0])

    def limits(self, volume: Array) -> tuple[Array, Array] | None:
        """Between what the result stays, slice by slice where one axis is alone; None where nothing overshoots."""
        axes = tuple(axis for axis, _ in self.steps)
        return (volume.min(axes, keepdims=True), volume.max(axes, keepdims=True)) if self.clips else None

    def part(self, volume: Array, limits: tuple[Array, Array] | None, rows: slice) -> Array:
        """Resample what is needed for these rows, in float32."""
        (first, matrix), *others = self.steps
        if matrix is None:
            result = self.rows_of(volume, rows).astype(np.float32)
        else:
            needed = matrix[rows]
            used = slice(needed.indices.min(), needed.indices.max() + 1)
            result = along(self.rows_of(volume, used), first, needed[:, used])
        for axis, matrix in others:
            result = along(result, axis, matrix)
        if limits is not None:
            result = np.clip(result, *limits)
        return result if self.alone is None else along(result, *self.alone)


def in_parallel(work: Callable[[slice], None], slabs: Iterable[slice], threads: int) -> None:
    """Call `work` for each slab: NumPy and SciPy compute outside of Python's lock."""
    with ThreadPoolExecutor(processors(threads)) as pool:
        list(pool.map(work, slabs))


def processors(threads: int) -> int:
    """Threads to take; 0: as many as there are processors for this process."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return threads or available or 1


def separate_axis(
    spacing: Sequence[float], new_spacing: Sequence[float], forced: bool | None, threshold: float
) -> int | None:
    """The axis that is resampled on its own; None: there is none."""
    for one in (spacing, new_spacing):
        if forced or (forced is None and max(one) / min(one) > threshold):
            coarsest = [axis for axis, s in enumerate(one) if s == max(one)]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


@lru_cache(maxsize=32)
def weights(n: int, size: int, order: int | str) -> Any:
    """Sparse matrix (size, n) of float32 that resamples one axis: what SciPy makes of unit vectors."""
    if n == size:
        return None
    if order == "nearest-exact":  # PyTorch's, in float32
        places = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * (np.float32(n) / np.float32(size))
        taken = np.minimum(places.astype(int), n - 1)
        return sparse.csr_array((np.ones(size, np.float32), (np.arange(size), taken)), (size, n))
    if order == 0:
        at = (np.arange(size) + 0.5) * (n / size) - 0.5
        columns = [ndimage.map_coordinates(unit, [at], order=0, mode="nearest") for unit in np.eye(n)]
    else:
        columns = [ndimage.zoom(unit, size / n, order=order, mode="nearest", grid_mode=True) for unit in np.eye(n)]
    matrix = np.stack(columns, 1)
    matrix[np.abs(matrix) < 1e-9] = 0
    return sparse.csr_array(matrix.astype(np.float32))


def along(volume: Array, axis: int, matrix: Any) -> Array:
    """Multiply one axis by a matrix; None: leave it."""
    if matrix is None:
        return volume
    lines = np.moveaxis(volume, axis, 0)
    result = matrix @ np.ascontiguousarray(lines, np.float32).reshape(len(lines), -1)
    return np.moveaxis(result.reshape(-1, *lines.shape[1:]), 0, axis)


# --- prediction ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to predict.

    Args:
        step_size: Distance of windows, in patches.
        mirroring: Average over the flips that the model allows.
        threads: That resample and add up logits; 0: one for each processor.
        progress: Called with windows done and all of them.
    """

    step_size: float = 0.5
    mirroring: bool = True
    threads: int = 0
    progress: Callable[[int, int], None] = lambda done, n: None


def predict_case(
    networks: Sequence[Network], files: Sequence[Path], model: Mapping[str, Any], options: Options
) -> tuple[Array, Image]:
    """Labels of one case, on the grid of its image."""
    image = read_image(files, model["channels"], model["reader"])
    case = prepare(image, model, options.threads)
    logits = predict_logits(networks, case.data, model, options)
    return postprocess(segment(logits, case, model, options.threads), model["postprocessing"]), image


def predict_logits(networks: Sequence[Network], data: Array, model: Mapping[str, Any], options: Options) -> Array:
    """Mean logits of the networks, (outputs, *spatial) in float16, as nnU-Net keeps them."""
    patch = tuple(model["patch_size"])
    padded, inside = pad(data, patch)
    windows = sliding_windows(padded.shape[1:], patch, options.step_size)
    weight = gaussian(patch)
    weight32 = weight.astype(np.float32)
    axes = model["mirroring_axes"] if options.mirroring else []
    count = np.zeros(padded.shape[1:], np.float16)
    for window in windows:
        count[window] += weight
    total = np.zeros((model["num_outputs"], *padded.shape[1:]), np.float16)
    logits = total if len(networks) == 1 else np.empty_like(total)
    with ThreadPoolExecutor(processors(options.threads)) as pool:  # of float16 NumPy is slow
        for i, network in enumerate(networks):
            logits.fill(0)
            for j, window in enumerate(windows, 1):
                found = mirrored(network, padded[all_channels(window)][None], axes)[0]
                pairs = zip(logits, found, strict=True)
                list(pool.map(add_weighted, ((channel[window], values, weight32) for channel, values in pairs)))
                options.progress(i * len(windows) + j, len(networks) * len(windows))
            list(pool.map(np.divide, logits, itertools.repeat(count), logits))
            if logits is not total:
                list(pool.map(np.add, total, logits, total))
        if len(networks) > 1:
            list(pool.map(np.divide, total, itertools.repeat(np.float16(len(networks))), total))
        if not all(pool.map(all_finite, total)):
            raise PredictionError(
                "Logits must stay below 65504, the largest number of float16: predict other folds by -f."
            )
    return total[all_channels(inside)]


def add_weighted(arrays: tuple[Array, Array, Array]) -> None:
    """Add values to a target, weighted."""
    target, values, weight = arrays
    target += values * weight


def all_finite(values: Array) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(np.isfinite(values).all())


def mirrored(network: Network, x: Array, axes: Sequence[int]) -> Array:
    """Mean over all flips of these spatial axes."""
    total = network(np.ascontiguousarray(x))
    flips = [flip for n in range(len(axes)) for flip in itertools.combinations([a + 2 for a in axes], n + 1)]
    for flip in flips:
        total += np.flip(network(np.ascontiguousarray(np.flip(x, flip))), flip)
    total /= np.float32(len(flips) + 1)
    return total


def pad(data: Array, patch: Sequence[int]) -> tuple[Array, tuple[slice, ...]]:
    """Fill up with zeros to one patch; return where the image lies."""
    shape = data.shape[1:]
    wanted = (*shape[: len(shape) - len(patch)], *patch)
    missing = [max(0, w - n) for w, n in zip(wanted, shape, strict=True)]
    around = [(m // 2, m - m // 2) for m in missing]
    inside = tuple(slice(before, before + n) for (before, _), n in zip(around, shape, strict=True))
    return np.pad(data, [(0, 0), *around]), inside


def sliding_windows(shape: Sequence[int], patch: Sequence[int], step: float) -> list[tuple[Any, ...]]:
    """Windows that cover an image, `step` patches apart at most; a 2D patch visits slice after slice."""
    across = len(shape) - len(patch)
    axes: list[list[Any]] = [list(range(n)) for n in shape[:across]]
    for n, p in zip(shape[across:], patch, strict=True):
        count = int(np.ceil((n - p) / (p * step))) + 1
        gap = (n - p) / max(1, count - 1)
        axes.append([slice(start, start + p) for start in (round(gap * i) for i in range(count))])
    return list(itertools.product(*axes))


@lru_cache(maxsize=1)
def gaussian(patch: tuple[int, ...]) -> Array:
    """Weights of the voxels of a window, float16."""
    peak = np.zeros(patch)
    peak[tuple(n // 2 for n in patch)] = 1
    weight = ndimage.gaussian_filter(peak, [n * SIGMA for n in patch], mode="constant")
    weight = (weight / (weight.max() / GAUSSIAN_PEAK)).astype(np.float16)
    weight[weight == 0] = weight[weight > 0].min()
    return weight


# --- from logits to a file -------------------------------------------------------------------------------------------


def segment(logits: Array, case: Prepared, model: Mapping[str, Any], threads: int = 0) -> Array:
    """Resample logits back slab by slab, take the label of the largest or those of all regions; the image's axes."""
    size = [s.stop - s.start for s in case.box]
    how, regions = model["resampling"]["probabilities"], model["regions_class_order"]
    resampling = Resampling.of(logits.shape[1:], size, case.spacing, case.original_spacing, how)
    labels = np.zeros(case.shape, np.uint16)
    limits = [resampling.limits(channel) for channel in logits]

    def label(rows: slice) -> None:
        channels = (resampling.part(*pair, rows) for pair in zip(logits, limits, strict=True))
        inside = resampling.rows_of(labels[case.box], rows)
        if regions is None:
            inside[:] = first_of_largest(channels, how["dtype"])
        else:
            for region, channel in zip(regions, channels, strict=True):
                inside[channel >= LEAST_POSITIVE] = region

    in_parallel(label, resampling.slabs(threads), threads)
    return labels.transpose(model["transpose_backward"])


def first_of_largest(channels: Iterator[Array], dtype: str) -> Array:
    """Which channel is largest in each voxel; the first where several are equal when rounded to `dtype`."""
    channel = next(channels)
    axes = sorted(range(channel.ndim), key=lambda axis: -channel.strides[axis])  # as they lie in memory
    largest = channel.transpose(axes).ravel()
    first = np.zeros(largest.shape, np.uint16)
    for i, other in enumerate(channels, 1):
        values = other.transpose(axes).ravel()
        better = np.flatnonzero(values > largest)
        first[better[values[better].astype(dtype) > largest[better].astype(dtype)]] = i
        np.maximum(largest, values, out=largest)
    return first.reshape(channel.transpose(axes).shape).transpose(np.argsort(axes))


def postprocess(labels: Array, rules: Sequence[Mapping[str, Any]]) -> Array:
    """Keep the largest component of the labels of each rule, as nnU-Net's postprocessing does."""
    for rule in rules:
        mask = np.isin(labels, rule["labels"])
        components, n = ndimage.label(mask, np.ones((3,) * labels.ndim))
        if n > 1:
            sizes = np.bincount(components.ravel())[1:]
            keep = np.flatnonzero(sizes == sizes.max()) + 1
            labels = np.where(mask & ~np.isin(components, keep), rule["background"], labels)
    return labels


# --- the command -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Options, named as those of nnUNetv2_predict_from_modelfolder."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("-i", dest="images", type=Path, required=True, metavar="IN", help="folder of images CASE_0000.nii.gz")
    add("-o", dest="output", type=Path, required=True, metavar="OUT", help="folder of segmentations")
    add(
        "-m", dest="model", type=Path, default=Path(__file__).parent, metavar="MODEL", help="default: that of this file"
    )
    add("-f", dest="folds", nargs="+", metavar="F", help="folds to average (all that were exported)")
    add("-step_size", type=float, help="of the sliding window, in patches (the model's)")
    add("--engine", choices=ENGINES, help="default: the first that was exported")
    add("-device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--disable_tta", action="store_true", help="no mirroring: faster, a little less accurate")
    add("--continue_prediction", action="store_true", help="leave out cases whose segmentation is there")
    add("--disable_progress_bar", action="store_true")
    add("--threads", type=int, default=0, metavar="N", help="of the CPU (all)")
    return made


def run(arguments: argparse.Namespace) -> int:
    """Predict all cases; return the exit status.

    A case that can't be predicted is told and left out, the others go on.
    """
    model = read_model(arguments.model)
    files = {network["fold"]: network["file"] for network in model["networks"]}
    chosen = list(dict.fromkeys(arguments.folds or files))
    if missing := [fold for fold in chosen if fold not in files]:
        raise PredictionError(f"-f needs exported folds, {missing[0]} is none: choose among {' '.join(files)}.")
    options = options_of(arguments, model)
    cases = find_cases(arguments.images, model["file_ending"])
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PredictionError(
            f"-o needs a folder that can be made, got {arguments.output} ({error}): choose another."
        ) from error
    engine = arguments.engine or model["engines"][0]

    def load(fold: str) -> Network:
        return load_network(arguments.model / files[fold], engine, arguments.threads, arguments.device)

    with ThreadPoolExecutor(processors(arguments.threads)) as pool:
        networks = list(pool.map(load, chosen))
    bar = not arguments.disable_progress_bar and sys.stderr.isatty()
    failed = 0
    for i, (case, images) in enumerate(cases.items(), 1):
        target = arguments.output / f"{case}{model['file_ending']}"
        if arguments.continue_prediction and target.is_file():
            continue

        def show(done: int, n: int, case: str = case) -> None:
            if bar:
                print(f"\r{case}: window {done} of {n} ", end="\n" if done == n else "", file=sys.stderr, flush=True)

        start = time.monotonic()
        try:
            labels, image = predict_case(networks, images, model, replace(options, progress=show))
            write_segmentation(labels, image, target)
        except (PredictionError, RuntimeError, ValueError, ArithmeticError, MemoryError, OSError) as error:
            failed += 1
            reason = error if isinstance(error, PredictionError) else f"{type(error).__name__} ({error})"
            print(f"error: {printable(case)}: {printable(str(reason))}", file=sys.stderr, flush=True)
        else:
            print(f"{i} of {len(cases)}  {target}  {time.monotonic() - start:.1f} s", flush=True)
    return 1 if failed else 0


def options_of(arguments: argparse.Namespace, model: Mapping[str, Any]) -> Options:
    """How to predict; PredictionError for numbers that mean nothing."""
    step_size = model["step_size"] if arguments.step_size is None else arguments.step_size
    if not 0.01 <= step_size <= 1:
        raise PredictionError(f"-step_size must be from 0.01 to 1, got {step_size:g}: use 0.5.")
    if arguments.threads < 0:
        raise PredictionError(f"--threads must be 0, all processors, or more, got {arguments.threads}: omit it.")
    return Options(step_size=step_size, mirroring=not arguments.disable_tta, threads=arguments.threads)


def printable(text: str) -> str:
    """Text on one line, whatever stands in it."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def main() -> None:
    """Run, or say in one line what is wrong."""
    try:
        sys.exit(run(parser().parse_args()))
    except PredictionError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
