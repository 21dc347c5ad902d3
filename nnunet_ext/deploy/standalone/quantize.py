"""Networks in int8 for OpenVINO: NNCF's post-training quantisation, calibrated on patches of the user's scans."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_ext.deploy.standalone import predict
from nnunet_ext.deploy.standalone.parity import cases_of
from nnunet_ext.errors import UsageError

PATCHES = 64  # that calibrate; NNCF's own default is 300 small images


def calibration_patches(images: Path, model: Mapping[str, Any]) -> list[predict.Array]:
    """Preprocess scans as prediction does, and take windows spread over each, (1, C, *patch).

    Raises:
        UsageError: a scan can't be read.
    """
    patch, taken = tuple(model["patch_size"]), []
    cases = cases_of(images, model["file_ending"])
    chosen = list(cases.values())[:: max(1, len(cases) // PATCHES)][:PATCHES]
    share = -(-PATCHES // len(chosen))
    for files in chosen:
        try:
            image = predict.read_image(files, model["channels"], model["reader"])
        except predict.PredictionError as error:
            raise UsageError(str(error)) from error
        data, _ = predict.pad(predict.prepare(image, model).data, patch)
        windows = predict.sliding_windows(data.shape[1:], patch, 0.5)
        for window in windows[:: max(1, len(windows) // share)][:share]:
            taken.append(data[predict.all_channels(window)][None].copy())
    return taken[:PATCHES]


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
