"""Networks for ONNX Runtime, of one size of patch: for machines without PyTorch."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ext.errors import UsageError


def export_any_batch(network: nn.Module, example: Tensor, path: Path) -> bool:
    """Write a network for batches of any size where it can be told so, else for those of `example`.

    Returns:
        Whether the batch can have any size.

    Raises:
        UsageError: see `export`.
    """
    try:
        export(network, torch.cat([example, example]), path, dynamic_shapes=({0: torch.export.Dim("batch")},))
        if _takes_any_batch(path):
            return True
    except UsageError:
        pass  # the example's own batch is what remains
    export(network, example, path)
    return False


def _takes_any_batch(path: Path) -> bool:
    """Whether the batch has no size: PyTorch may give it that of the example without a word."""
    import onnx

    (image,) = onnx.load(str(path), load_external_data=False).graph.input
    return bool(image.type.tensor_type.shape.dim[0].dim_param)


def export(network: nn.Module, example: Tensor, path: Path, **options: Any) -> None:
    """Write a network whose input "image" has the shape of `example`, and whose output is "logits".

    Args:
        network: To write.
        example: Input.
        path: File to write.
        options: Of `torch.onnx.export`.

    Raises:
        UsageError: the network computes something that ONNX does not have.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # of the exporter's own passes
            torch.onnx.export(
                network,
                (example,),
                str(path),
                input_names=["image"],
                output_names=["logits"],
                dynamo=True,
                verbose=False,
                external_data=False,
                **options,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).partition("<class")[2].partition("\n")[0] or str(error).partition("\n")[0]
        raise UsageError(
            f"ONNX can't express what {type(network).__name__} computes ({reason.strip(' >')}): ship the model "
            "without ONNX."
        ) from error
    finally:
        logger.setLevel(level)


def predict(path: Path, image: Tensor) -> Tensor:
    """Run a file on the CPU by ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.as_tensor(session.run(["logits"], {"image": image.numpy()})[0])
