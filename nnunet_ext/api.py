"""The commands as functions, and any registered network by its name; see docs/how-to/python.md.

Mistakes are `nnunet_ext.errors.UsageError`, a sentence with the rule, the value and the cure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nnunet_ext import registry
from nnunet_ext.advise.advise import advise as _advise
from nnunet_ext.advise.records import Advice
from nnunet_ext.aims import Aim
from nnunet_ext.comparison import compare as _comparison
from nnunet_ext.comparison import report as _report
from nnunet_ext.comparison import selection as _selection
from nnunet_ext.comparison.compare import Comparison
from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.deploy.ship import DeployOptions, Shipped, ship
from nnunet_ext.deploy.standalone.export import Exported, ExportOptions, export
from nnunet_ext.deploy.stock import Stocked, stock
from nnunet_ext.errors import UsageError
from nnunet_ext.memory.estimate import Estimate
from nnunet_ext.memory.estimate import estimate as _estimate
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT
from nnunet_ext.nnunet.source import Source


def create(network: str, input_channels: int, num_classes: int, patch_size: Sequence[int], **options: Any) -> nn.Module:
    """Build a network with the topology that nnU-Net plans for a patch of an isotropic image.

    Args:
        network: Name of a registered architecture, or PlainConvUNet.
        input_channels: Channels of the image.
        num_classes: Channels of the logits, background included.
        patch_size: Voxels per axis, two or three; what the strides do not divide is rounded up, as nnU-Net does.
        options: Options of the network, and any argument of plans that is to be another.

    Raises:
        UsageError: no network has this name; a patch that can't be.
    """
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    planned = Source(patch=tuple(patch_size)).setting().configuration_manager
    built: nn.Module = get_network_from_plans(
        _path_of(network, planned.network_arch_class_name),
        {**planned.network_arch_init_kwargs, "deep_supervision": False, **options},
        planned.network_arch_init_kwargs_req_import,
        input_channels,
        num_classes,
        allow_init=True,
    )
    return built


def _path_of(network: str, default: str) -> str:
    if network == default.rpartition(".")[2]:
        return default
    try:
        found = registry.resolve("architectures", network)
    except registry.UnknownNameError as error:
        known = ", ".join([default.rpartition(".")[2], *registry.names("architectures")])
        raise UsageError(f"a network must be one of {known}, got {network}: choose one.") from error
    return f"{found.__module__}.{found.__name__}"


def estimate(trainer: str = registry.CORE_TRAINER, *, measure: bool = False, **source: Any) -> Estimate:
    """Count the memory that a training needs on a GPU.

    Args:
        trainer: Name, with or without a schedule.
        measure: Run a real step on this machine's GPU too.
        source: What `nnunet_ext.nnunet.source.Source` takes: ``dataset`` and ``configuration``, ``plans_file``, or
            ``patch``.

    Raises:
        UsageError: as `nnunet-ext estimate`.
    """
    return _estimate(Source(**source).setting(), trainer, measure)


def advise(dataset: str, aim: Aim = "context", **options: Any) -> Advice:
    """Plan every method for a data set and a GPU, on shapes; nothing is written.

    Args:
        dataset: Number or DatasetXXX_Name; its fingerprint is read.
        aim: What the rows are sorted by: "context", "memory", "size" or "speed".
        options: What `nnunet_ext.advise.advise.advise` takes: ``gpu`` in GB, ``configuration``, ``everything``,
            ``processes``. More than one process needs a script that can be imported, as always in Python.

    Raises:
        UsageError: as `nnunet-ext advise`.
    """
    return _advise(dataset, aim, **options)


def compare(output: str | Path | None = None, **selected: Any) -> Comparison:
    """Compare trained models.

    Args:
        output: Folder that the report is written to; None: nothing is written.
        selected: What `nnunet_ext.comparison.selection.Selection` takes: ``dataset`` and ``trainers``, or ``folders``.

    Raises:
        UsageError: as `nnunet-ext compare`.
    """
    folder = None if output is None else Path(output)
    comparison = _comparison.compare(_selection.request(_selection.Selection(output=folder, **selected)))
    if folder is not None:
        _report.write(comparison, folder)
    return comparison


def deploy(
    model: str | Path,
    output: str | Path,
    *,
    folds: Sequence[str] | None = None,
    checkpoint: str = FINAL_CHECKPOINT,
    trusted: bool = False,
    **options: Any,
) -> dict[str, Shipped]:
    """Write a trained model for prediction; return what became of each fold.

    Args:
        model: Folder TRAINER__PLANS__CONFIGURATION of a training.
        output: Folder that does not exist yet.
        folds: Names of folds; None: all that have the checkpoint.
        checkpoint: File name in each fold's folder.
        trusted: Build whatever code the plans name.
        options: What `nnunet_ext.deploy.ship.DeployOptions` takes: ``dtype``, ``form``, ``onnx``, ``images``.

    Raises:
        UsageError: as `nnunet-ext deploy`.
    """
    return ship(TrainedModel.read(Path(model), folds, checkpoint, trusted), Path(output), DeployOptions(**options))


def deploy_stock(
    model: str | Path,
    output: str | Path,
    *,
    images: str | Path | None = None,
    folds: Sequence[str] | None = None,
    checkpoint: str = FINAL_CHECKPOINT,
    trusted: bool = False,
) -> dict[str, Stocked]:
    """Write a trained model as one of nnU-Net's own; return what became of each fold.

    Args:
        model, output, folds, checkpoint, trusted: See `deploy`.
        images: Folder of images to check with.

    Raises:
        UsageError: as `nnunet-ext deploy --stock`.
    """
    return stock(TrainedModel.read(Path(model), folds, checkpoint, trusted), Path(output), _path(images))


def deploy_standalone(
    model: str | Path,
    output: str | Path,
    *,
    images: str | Path | None = None,
    references: str | Path | None = None,
    calibration: str | Path | None = None,
    folds: Sequence[str] | None = None,
    checkpoint: str = FINAL_CHECKPOINT,
    trusted: bool = False,
    **options: Any,
) -> Exported:
    """Write a trained model as a folder that predicts without nnU-Net and PyTorch; return what was found.

    Args:
        model, output, folds, checkpoint, trusted: See `deploy`.
        images, references, calibration: Folders, see `nnunet_ext.deploy.standalone.export.ExportOptions`.
        options: What it takes besides: ``engines``, ``form``.

    Raises:
        UsageError: as `nnunet-ext deploy --standalone`.
    """
    chosen = ExportOptions(
        images=_path(images), references=_path(references), calibration=_path(calibration), **options
    )
    return export(TrainedModel.read(Path(model), folds, checkpoint, trusted), Path(output), chosen)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
