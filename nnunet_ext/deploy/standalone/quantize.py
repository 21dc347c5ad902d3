"""Networks in int8 for OpenVINO: NNCF's post-training quantisation, calibrated on patches of the user's scans."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_ext.deploy.standalone import predict
from nnunet_ext.errors import UsageError

PATCHES = 64  # that calibrate; NNCF's own default is 300 small images


def calibration_patches(images: Path, model: Mapping[str, Any]) -> list[predict.Array]:
    """Preprocess scans as prediction does, and take windows of all of them in turn, (1, C, *patch) each.

    Raises:
        UsageError: a scan can't be read.
    """
    patch, waiting = tuple(model["patch_size"]), []
    try:
        for files in predict.find_cases(images, model["file_ending"]).values():
            image = predict.read_image(files, model["channels"], model["reader"])
            data, _ = predict.pad(predict.prepare(image, model).data, patch)
            windows = predict.sliding_windows(data.shape[1:], patch, 1.0)
            middle = len(windows) // 2  # the borders of an image show little
            waiting.append([(data, window) for window in (*windows[middle:], *windows[:middle])])
            if len(waiting) == PATCHES:
                break
    except predict.PredictionError as error:
        raise UsageError(str(error)) from error
    taken: list[predict.Array] = []
    for queue in cycle(waiting):
        if len(taken) == PATCHES or not any(waiting):
            return taken
        if queue:
            data, window = queue.pop(0)
            taken.append(np.ascontiguousarray(data[predict.all_channels(window)][None]))
    return taken


def quantize(file: Path, patches: list[predict.Array]) -> None:
    """Write the int8 network beside the ONNX file of a fold."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    network = openvino.Core().read_model(file)
    network.reshape(patches[0].shape)
    quantized = nncf.quantize(
        network, nncf.Dataset(patches), preset=nncf.QuantizationPreset.MIXED, subset_size=len(patches)
    )
    openvino.save_model(quantized, predict.int8_file(file), compress_to_fp16=False)
