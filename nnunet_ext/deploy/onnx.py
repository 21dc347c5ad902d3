"""Fused networks for ONNX Runtime: one static patch, for machines without PyTorch."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from nnunet_ext.errors import UsageError


def export(network: nn.Module, example: Tensor, path: Path) -> None:
    """Write a network whose input "image" has the shape of `example`, and whose output is "logits".

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
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).partition("<class")[2].partition("\n")[0] or str(error).partition("\n")[0]
        raise UsageError(
            f"--onnx needs a network that ONNX can express, {type(network).__name__} is none ({reason.strip(' >')}): "
            "leave it out."
        ) from error
    finally:
        logger.setLevel(level)


def predict(path: Path, image: Tensor) -> Tensor:
    """Run a file on the CPU by ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.as_tensor(session.run(["logits"], {"image": image.numpy()})[0])
