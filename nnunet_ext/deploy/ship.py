"""Fuses a trained model, proves that it predicts the same, and writes it to a folder that is whole or not there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ext import __version__, extras
from nnunet_ext.architectures.common.onednn import computes_natively
from nnunet_ext.architectures.deployed import DTYPES, DeployedNetwork, NothingToFuseError, fused
from nnunet_ext.architectures.fusion.blocks import Form
from nnunet_ext.deploy import card, onnx
from nnunet_ext.deploy.check import (
    FLOAT16_MAX,
    Difference,
    check_same,
    largest_activation,
    patches_of,
    predict_unfused,
    random_patch,
)
from nnunet_ext.deploy.folder import check_new, count, write_checkpoint, write_json, write_sums
from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.errors import UsageError
from nnunet_ext.files import whole_folder
from nnunet_ext.nnunet.model_folder import DEPLOYED
from nnunet_ext.nnunet.training_log import TrainingLog, read_log, record


@dataclass(frozen=True)
class DeployOptions:
    """What the model is made into.

    Args:
        dtype: A key of `DTYPES`.
        form: Form of fused FasterFusion blocks.
        onnx: Also write ONNX files.
        images: Folder of real images to check with; None: only random ones.
    """

    dtype: str = "float32"
    form: Form = "hybrid"
    onnx: bool = False
    images: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """One fold, before and after.

    Args:
        parameters, parameters_before: Numbers of weights.
        bytes, bytes_before: Size of the checkpoint's file, deployed and trained.
        differences: Differences of the deployed network to the trained one.
        onnx_differences: Differences of ONNX Runtime to the fused network in float32.
        training: Length and curves of the training that it came from, for `nnunet-ext compare`.
    """

    parameters_before: int
    parameters: int
    bytes_before: int
    bytes: int
    differences: tuple[Difference, ...]
    onnx_differences: tuple[Difference, ...]
    training: TrainingLog


def ship(
    model: TrainedModel, output: Path, options: DeployOptions, show: Callable[[str], None] = lambda what: None
) -> dict[str, Shipped]:
    """Write the model; return what became of each fold.

    Args:
        model: Trained.
        output: A folder that does not exist yet.
        options: See there.
        show: Called before each piece of work.

    Raises:
        UsageError: `output` exists, there is nothing to fuse, weights don't fit, or the result is not the same.
    """
    check_new(output)
    if options.onnx:
        extras.need("onnx", "--onnx")
    images = patches_of(model.setting, options.images)
    with whole_folder(output) as folder:
        shipped = {}
        for fold in model.checkpoints:
            show(f"fold {fold}")
            shipped[fold] = _Fold(model, fold, options, images, folder).ship()
        write_json(folder / "dataset.json", model.setting.dataset)
        write_json(folder / "plans.json", _plans(model, options))
        report = {"nnunet_ext": __version__, "trainer": model.trainer, **asdict(options), "images": sorted(images)}
        folds = {f: {**asdict(s), "training": record(s.training)} for f, s in shipped.items()}
        write_json(folder / "deployment.json", {**report, "folds": folds})
        (folder / card.NAME).write_text(card.text(model, card.FUSED), encoding="utf-8")
        write_sums(folder)
    return shipped


def _plans(model: TrainedModel, options: DeployOptions) -> dict[str, Any]:
    """Plans that tell `nnUNetTrainerDeployed` what to build."""
    plans: dict[str, Any] = copy.deepcopy(dict(model.setting.plans))
    plans["configurations"][model.setting.configuration]["deployed"] = {
        "trainer": model.trainer,
        "form": options.form,
        "dtype": options.dtype,
    }
    return plans


class _Fold:
    """One fold on its way."""

    def __init__(
        self, model: TrainedModel, fold: str, options: DeployOptions, images: Mapping[str, Tensor], folder: Path
    ) -> None:
        self._model = model
        self._fold = fold
        self._options = options
        self._images = images
        self._folder = folder / f"fold_{fold}"
        self._regions = bool(model.setting.label_manager.has_regions)

    def ship(self) -> Shipped:
        """Fuse, check, write."""
        trained = self._model.trained_network(self._fold)
        try:
            network = fused(trained, self._options.form)
        except NothingToFuseError as error:
            raise UsageError(f"{self._model.trainer}: {error}") from error
        self._folder.mkdir()
        # What the predictor's ONNX file and the check of float16 need, before weights become half.
        exported = self._export(network) if self._options.onnx else ()
        if self._options.dtype == "float16":
            self._check_range(network)
        deployed = DeployedNetwork(network, DTYPES[self._options.dtype]).eval()
        return Shipped(
            parameters_before=count(trained),
            parameters=count(network),
            bytes_before=self._model.checkpoints[self._fold].stat().st_size,
            bytes=write_checkpoint(self._folder, self._model, deployed, DEPLOYED),
            differences=self._compare(trained, deployed),
            onnx_differences=exported,
            training=read_log(self._model.checkpoints[self._fold].parent)[0],
        )

    def _compare(self, trained: nn.Module, deployed: nn.Module) -> tuple[Difference, ...]:
        differences = []
        for name, image in self._images.items():
            with torch.inference_mode():
                after = deployed(image)
            found = Difference.of(name, predict_unfused(trained, image), after, self._regions)
            rule = f"The fused network must predict what the trained one does, fold {self._fold} does not"
            if not after.isfinite().all():
                raise UsageError(f"{rule}: its logits are not finite: ship the model as it was trained.")
            exact = self._options.dtype == "float32"
            differences.append(check_same(found, rule, "ship the model as it was trained") if exact else found)
        return tuple(differences)

    def _check_range(self, network: nn.Module) -> None:
        largest = max(largest_activation(network, image) for image in self._images.values())
        if largest > FLOAT16_MAX:
            raise UsageError(
                f"float16 holds numbers up to {FLOAT16_MAX:.0f}, fold {self._fold} computes with {largest:.0f}: use "
                "--dtype bfloat16."
            )

    def _export(self, network: nn.Module) -> tuple[Difference, ...]:
        path = self._folder / "model.onnx"
        noise = random_patch(self._model.setting)
        onnx.export(network, noise, path)
        patches = {"random": noise, **{n: x for n, x in self._images.items() if n != "random"}}
        found = []
        for name, patch in patches.items():
            with torch.inference_mode():
                expected = network(patch)
            difference = Difference.of(name, expected, onnx.predict(path, patch), self._regions)
            rule = f"ONNX Runtime must predict what PyTorch does, fold {self._fold} does not"
            found.append(check_same(difference, rule, "leave --onnx out"))
        return tuple(found)


def predict_command(output: Path, folds: Iterable[str]) -> list[str]:
    """nnU-Net's command that predicts with a deployed model on this machine."""
    command = ["nnUNetv2_predict_from_modelfolder", "-m", str(output), "-i", "IN", "-o", "OUT", "-f", *folds]
    return command if torch.cuda.is_available() else [*command, "-device", "cpu"]


def precision_note(dtype: str) -> str:
    """What a half precision means on this machine."""
    if computes_natively(DTYPES[dtype]):
        return f"Computes in {dtype}, on this CPU as well."
    return f"This CPU has no instructions for {dtype}: on it the model computes in float32, on a GPU in {dtype}."
